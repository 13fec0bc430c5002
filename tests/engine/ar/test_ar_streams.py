"""Tapped states as streams: every row once, the same as whole, whatever the pool and the prefix cache do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.ar import GREEDY, assert_clean, done, drain, make_engine, make_model_folder, make_task, run, submit
from torch import Tensor

from vllm_omni.engine.ar.engine import AREngine
from vllm_omni.messages import StageEvent, StageRows
from vllm_omni.params import SamplingParams

PROMPT = "a red circle left of a blue square"
TAPS = {
    "read": {"layers": [-2, 0], "tokens": "prompt"},
    "written": {"layers": [1], "tokens": "completion"},
    "fed": {"layers": [1], "tokens": "followed"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("ar") / "model")


def streamed(engine: AREngine, *prompts: str, params: SamplingParams = GREEDY) -> list[StageEvent]:
    submit(engine, *(make_task(prompt, params, prompt) for prompt in prompts))
    return drain(engine)


def pieces(events: list[StageEvent], name: str, port: str) -> list[StageRows]:
    return [e for e in events if isinstance(e, StageRows) and (e.request_id, e.port) == (name, port)]


def joined(events: list[StageEvent], name: str, port: str) -> Tensor:
    """All rows of a port; the last piece, and no other, says that it is."""
    found = pieces(events, name, port)
    assert [piece.is_last for piece in found] == [False] * (len(found) - 1) + [True]
    return torch.cat([piece.rows for piece in found])


def whole(folder: Path, prompt: str, params: SamplingParams = GREEDY) -> dict[str, Tensor]:
    engine = make_engine(folder, outputs=TAPS, wanted=TAPS)
    return dict(done(run(engine, make_task(prompt, params))["r"]).payload.tensors)


@pytest.mark.parametrize(
    "options",
    [{}, {"max_num_batched_tokens": 5}, {"num_blocks": 16}, {"num_blocks": 16, "prefix_caching": False}],
)
def test_streamed_rows_are_the_whole_tensors(folder: Path, options: dict[str, Any]) -> None:
    prompts = [PROMPT, PROMPT + " again", "the end of the world"]
    engine = make_engine(folder, outputs=TAPS, streamed=TAPS, **options)
    for _ in range(2):  # the second time from the prefix cache
        events = streamed(engine, *prompts)
        for prompt in prompts:
            expected = whole(folder, prompt)
            for port in TAPS:
                torch.testing.assert_close(joined(events, prompt, port), expected[port], rtol=1e-4, atol=1e-5)
    assert ("num_blocks" in options) == (engine.get_stats()["num_preemptions"] > 0)
    assert_clean(engine)


def test_a_row_comes_as_soon_as_it_is_computed(folder: Path) -> None:
    events = streamed(make_engine(folder, outputs=TAPS, streamed=TAPS), PROMPT)
    assert [len(piece.rows) for piece in pieces(events, PROMPT, "fed")] == [1] * 11
    assert [len(piece.rows) for piece in pieces(events, PROMPT, "written")] == [1] * 12
    assert len(pieces(events, PROMPT, "read")) == 1


def test_the_token_that_ends_the_text_has_no_row(folder: Path) -> None:
    free = whole(folder, PROMPT)
    engine = make_engine(folder)
    tokens = done(run(engine, make_task(PROMPT, GREEDY))["r"]).payload.meta["token_ids"]
    place = tokens.index(tokens[4])
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=[tokens[4]])
    events = streamed(make_engine(folder, outputs=TAPS, streamed=TAPS), PROMPT, params=params)
    for port in ("written", "fed"):
        torch.testing.assert_close(joined(events, PROMPT, port), free["written"][:place], rtol=1e-4, atol=1e-5)


def test_followed_rows_are_those_of_the_completion_but_the_last_of_a_full_one(folder: Path) -> None:
    states = whole(folder, PROMPT)
    assert len(states["fed"]) == len(states["written"]) - 1 == 11
    assert torch.equal(states["fed"], states["written"][:-1])


def test_a_prompt_that_is_only_encoded_streams_as_well(folder: Path) -> None:
    outputs = {"read": TAPS["read"]}
    engine = make_engine(folder, task="encode", outputs=outputs, streamed=outputs, max_num_batched_tokens=3)
    events = streamed(engine, PROMPT)
    assert len(pieces(events, PROMPT, "read")) == 3, "one for each step"
    torch.testing.assert_close(joined(events, PROMPT, "read"), whole(folder, PROMPT)["read"], rtol=1e-4, atol=1e-5)
