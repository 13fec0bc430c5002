"""A step of a language model for which memory does not suffice fails the tasks of that step alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.ar import GREEDY, assert_clean, make_engine, make_model_folder, make_task, run, submit, tokens_of

from vllm_omni.errors import ResourceError
from vllm_omni.messages import StageDone, StageFailed

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
    MemoryError(),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("ar") / "model")


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("when", ["in the first step", "later"])
def test_the_tasks_of_the_step_fail_and_those_that_wait_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, when: str
) -> None:
    plain = make_engine(folder)
    expected = run(plain, make_task("a red circle", GREEDY, "waits"))["waits"]
    engine = make_engine(folder, max_num_seqs=2)
    for name in ("one", "two", "waits"):
        submit(engine, make_task("a red circle", GREEDY, name))
    if when == "later":
        engine.step()
        engine.step()
    compute, broken = type(engine._runner).run, [error]

    def run_out(self: Any, *given: Any) -> Any:
        if broken:
            raise broken.pop()
        return compute(self, *given)

    monkeypatch.setattr(type(engine._runner), "run", run_out)
    failed = [event for event in engine.step() if isinstance(event, StageFailed)]
    assert [event.request_id for event in failed] == ["one", "two"]
    for event in failed:
        assert "out of memory" in str(event.error) and isinstance(event.error.__cause__, ResourceError)
        assert event.error.__cause__.__cause__ is error
        assert (event.made is not None) and len(event.made.meta["completions"][0]["token_ids"]) == 2 * (when == "later")
    ended = run(engine)
    assert isinstance(expected, StageDone) and tokens_of(ended["waits"]) == tokens_of(expected)
    assert_clean(engine)


def test_another_failure_of_the_step_is_the_engines_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(folder)
    submit(engine, make_task("a", GREEDY, "r"))

    def broken(*_: Any) -> Any:
        raise RuntimeError("the kernel is gone")

    monkeypatch.setattr(type(engine._runner), "run", broken)
    with pytest.raises(RuntimeError, match="the kernel is gone"):
        engine.step()
