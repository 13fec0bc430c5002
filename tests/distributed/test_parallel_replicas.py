"""Several replicas of a stage whose model several ranks share, in processes of their own and in threads of this one: a
rank that is lost ends its group, with its cause, and no other.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.ar import GREEDY, make_model_folder, shared_text_config
from support.belongings import children, descendants

from vllm_omni import Omni, SamplingParams

PROMPTS = ["a red circle", "the end of the world and", "x", "a red circle"]
SAMPLED = SamplingParams(temperature=0.8, seed=3, max_tokens=10, ignore_eos=True)
SOON_S = 20.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model"))


def config(folder: Path, **stage: Any) -> dict[str, Any]:
    return shared_text_config(folder, stage=stage, resources={"threads": 1})


@contextmanager
def shared(folder: Path, executor: str) -> Iterator[Omni]:
    """Two replicas of two ranks each, of which no process is left behind."""
    before = descendants(os.getpid())
    with Omni(config=config(folder, parallel={"tensor": 2}, replicas=2, executor=executor), progress=False) as omni:
        yield omni
    until(lambda: descendants(os.getpid()) <= before)


@pytest.fixture(scope="module")
def omni(folder: Path) -> Iterator[Omni]:
    """Its first ranks are processes, too."""
    with shared(folder, "process") as omni:
        yield omni


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def replicas(omni: Omni) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = omni.get_status()["stages"]["text"]["replicas"]
    return found


def followers(omni: Omni) -> set[int]:
    """The processes of all ranks but the first of each replica."""
    return set().union(*(children(replica["pid"]) for replica in replicas(omni)))


def tokens(omni: Omni, params: SamplingParams) -> list[Any]:
    outputs = omni.generate(PROMPTS, params)
    assert all(output.error is None for output in outputs), [output.error for output in outputs]
    return [output.token_ids for output in outputs]


def check_replicas(omni: Omni, folder: Path) -> None:
    """They write what one rank does."""
    with Omni(config=config(folder), progress=False) as alone:
        for params in (GREEDY, SAMPLED):
            assert tokens(omni, params) == tokens(alone, params)
    stats = omni.get_metrics()["stages"]["text"]["replicas"]
    assert [each["num_ranks"] for each in stats] == [2, 2]
    planned = omni.get_metrics()["memory"]["planned_bytes"]["text"]
    assert planned == 2 * omni._executor.pipeline.specs["text"].plan_memory().total_bytes, "weights twice, too"


def test_replicas_of_several_ranks_in_processes_write_what_one_does(omni: Omni, folder: Path) -> None:
    check_replicas(omni, folder)
    assert len(followers(omni)) == 2


def test_replicas_of_several_ranks_in_threads_write_what_one_does(folder: Path) -> None:
    with shared(folder, "auto") as omni:
        check_replicas(omni, folder)


def test_a_rank_that_dies_ends_its_group_with_the_cause_and_no_other(omni: Omni) -> None:
    params = dataclasses.replace(GREEDY, max_tokens=100)
    expected = omni.generate(PROMPTS[0], params)[0].token_ids
    before, places = followers(omni), replicas(omni)
    outputs, causes = [], set[str]()
    for part in omni.stream(PROMPTS[0], params):
        if not outputs:
            os.kill(victim := min(before), signal.SIGKILL)
        outputs.append(part)
        causes |= {str(replica["cause"]) for replica in replicas(omni)}
    while not all(replica["state"] == "ready" for replica in replicas(omni)) or not rebuilt(omni):
        assert omni.generate("x", GREEDY)[0].error is None, "the other replica goes on"
        causes |= {str(replica["cause"]) for replica in replicas(omni)}
    assert outputs[-1].token_ids == expected and any("rank 1 of 2 was killed by SIGKILL" in cause for cause in causes)
    (number,) = rebuilt(omni)
    other = replicas(omni)[1 - number]
    assert other["num_rebuilds"] == 0 and other["pid"] == places[1 - number]["pid"]
    after = followers(omni)
    assert len(after) == 2 and after & before == before - {victim}
    assert places[number]["pid"] not in descendants(os.getpid())
    assert len({tuple(each) for each in (tokens(omni, GREEDY), tokens(omni, GREEDY))}) == 1


def test_ranks_go_with_the_process_of_their_stage(omni: Omni) -> None:
    stage = replicas(omni)[0]["pid"]
    mates = children(stage)
    os.kill(stage, signal.SIGKILL)
    assert len(mates) == 1
    until(lambda: omni.generate("x", GREEDY)[0].error is None and not any(map(is_there, mates)))


def rebuilt(omni: Omni) -> list[int]:
    return [number for number, replica in enumerate(replicas(omni)) if replica["num_rebuilds"]]


def is_there(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()
