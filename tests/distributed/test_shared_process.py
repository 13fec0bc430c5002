"""Stages that share a process apart from the loop's: one starts for all, what one of them does wrong is not the others'
fault, and it ends with the last.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import support.apart_stages  # noqa: F401
from support.belongings import children
from support.driver import Driver
from support.loop import request
from support.toy_engine import TextParams, toy_config, toy_stage

from vllm_omni.config.loader import load_config
from vllm_omni.entrypoints.loading import set_apart
from vllm_omni.errors import ConfigError
from vllm_omni.executor.omni_executor import OmniExecutor
from vllm_omni.executor.pipeline import Pipeline

LONG = TextParams(steps=60)  # of 10 ms
WORKER_TIMEOUT_S = 1.0


@pytest.fixture
def driver() -> Iterator[Driver]:
    """`one` and `other` in one process, `third` in another."""
    before = children()
    shared: dict[str, Any] = {"executor": "process", "step_s": 0.01}
    stages = {name: toy_stage(name, "apart_text", process="both", **shared) for name in ("one", "other")}
    stages["third"] = toy_stage("third", "apart_text", **shared)
    config = toy_config(stages=stages, outputs=tuple(stages), worker_timeout=WORKER_TIMEOUT_S)
    driver = Driver(OmniExecutor(Pipeline(config)))
    yield driver
    driver.loop.shutdown()
    assert children() <= before


def status(driver: Driver, stage: str) -> dict[str, Any]:
    found: dict[str, Any] = driver.loop.get_status()["stages"][stage]
    return found


def pids(driver: Driver) -> tuple[Any, ...]:
    return tuple(status(driver, name)["pid"] for name in ("one", "other", "third"))


def asked(driver: Driver, stage: str, name: str, **params: Any) -> None:
    """One request of one stage."""
    given = request(name, params.pop("prompt", "x"), outputs=(stage,), params=TextParams(**params))
    driver.loop.add_request(given, stream=True)


def until_at_work(driver: Driver, *names: str) -> None:
    driver.until(lambda: all(any(part.request_id == name for part in driver.outputs) for name in names))


def until_done(driver: Driver, *names: str) -> None:
    driver.until(lambda: all(driver.final(name) is not None for name in names))


def retried(driver: Driver, name: str, stage: str) -> int:
    output = driver.final(name)
    assert output is not None and output.error is None, output
    return int(output.metrics[stage].get("retried", 0))


def test_they_are_answered_by_one_process_and_others_are_not(driver: Driver) -> None:
    one, other, third = pids(driver)
    assert one == other != third
    for name in ("one", "other", "third"):
        asked(driver, name, name)
    until_done(driver, "one", "other", "third")
    assert {output.text for output in driver.outputs if output.finished} == {"xx"}


def test_a_crash_costs_the_stage_that_was_at_work_and_the_others_requests_as_often_as_it_takes(driver: Driver) -> None:
    """The request that crashes it ends after two runs; the other one is lost twice as well, and not to blame."""
    first = pids(driver)
    asked(driver, "other", "innocent", steps=100)
    asked(driver, "third", "apart", steps=100)
    until_at_work(driver, "innocent", "apart")
    asked(driver, "one", "guilty", prompt="do=segfault")
    until_done(driver, "guilty", "innocent", "apart")
    guilty = driver.final("guilty")
    assert guilty is not None and "was killed by SIGSEGV" in str(guilty.error)
    assert retried(driver, "innocent", "other") == 0, "what was told before goes on"
    now = pids(driver)
    assert now[0] == now[1] != first[0] and now[2] == first[2]
    assert status(driver, "other")["num_rebuilds"] >= 2 and status(driver, "other")["num_retries"] == 2


def test_a_stage_that_hangs_ends_the_process_and_alone_is_called_stuck(driver: Driver) -> None:
    first = pids(driver)
    asked(driver, "other", "innocent", steps=60)
    until_at_work(driver, "innocent")
    asked(driver, "one", "guilty", do="block")
    driver.until(lambda: driver.final("guilty") is not None and driver.final("innocent") is not None, 30)
    guilty, innocent = driver.final("guilty"), driver.final("innocent")
    assert guilty is not None and "no progress" in str(guilty.error)
    assert innocent is not None and innocent.error is None and innocent.text == 60 * "x"
    assert status(driver, "other")["num_rebuilds"] >= 1
    assert pids(driver)[0] != first[0]


def test_a_stage_whose_engine_breaks_is_loaded_again_beside_the_others(driver: Driver) -> None:
    first = pids(driver)
    asked(driver, "other", "innocent", steps=100)
    until_at_work(driver, "innocent")
    asked(driver, "one", "guilty", do="exit")
    until_done(driver, "guilty", "innocent")
    guilty = driver.final("guilty")
    assert guilty is not None and "its process was ended by SystemExit: leaving" in str(guilty.error)
    driver.until_ready("one")
    asked(driver, "one", "next")
    until_done(driver, "next")
    assert retried(driver, "next", "one") == retried(driver, "innocent", "other") == 0
    assert pids(driver) == first and status(driver, "other")["num_rebuilds"] == 0


def test_a_process_that_is_killed_is_one_again(driver: Driver) -> None:
    first = pids(driver)
    for name in ("one", "other"):
        asked(driver, name, name, steps=40)
    until_at_work(driver, "one", "other")
    os.kill(first[0], signal.SIGKILL)
    until_done(driver, "one", "other")
    assert retried(driver, "one", "one") + retried(driver, "other", "other") in (1, 2)
    now = pids(driver)
    assert now[0] == now[1] != first[0]


@pytest.mark.parametrize("said", [{"process": ""}, {"process": "a"}, {"process": "a", "executor": "inline"}])
def test_a_name_without_processes_is_refused(said: dict[str, str]) -> None:
    stage = {"kind": "ar", "model": "asset://tiny-scene/text_encoder", **said}
    with pytest.raises(ConfigError, match=r"stages\.text\.process: got .* expected the name of a process"):
        load_config({"stages": {"text": stage}, "outputs": ["text"]})


def test_a_name_at_the_top_is_for_stages_with_processes_of_which_there_are_some() -> None:
    named = load_config("tiny_omni", ["process=models", "image.executor=process", "image.process=drawing"])
    assert {stage.process for stage in named.stages.values()} == {None, "drawing"}
    shared = load_config("tiny_omni", ["process=models", "executor=process", "image.executor=inline"])
    assert {stage.process for name, stage in shared.stages.items() if name != "image"} == {"models"}
    assert shared.stages["image"].process is None
    with pytest.raises(ConfigError, match="process: got 'models', but no stage has `executor: process`"):
        load_config("tiny_omni", ["process=models"])


def test_stages_that_say_where_they_run_are_not_set_apart() -> None:
    config = load_config("tiny_omni", ["image.executor=inline", "thinker.replicas=2"])
    found = {name: (stage.executor, stage.process) for name, stage in set_apart(config).stages.items()}
    assert found.pop("image") == ("inline", None) and found.pop("thinker") == ("auto", None)
    assert set(found.values()) == {("process", "models")}
