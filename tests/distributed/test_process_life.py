"""Processes of stages that die, hang, lie or lose their parent: the loop never waits, every request ends with the
cause, the stage is rebuilt, and nothing is left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
import support.apart_stages  # noqa: F401
from support.belongings import children, descriptors
from support.driver import Driver
from support.loop import request
from support.toy_engine import TextParams, toy_config, toy_stage

from vllm_omni import AsyncOmni
from vllm_omni.errors import OmniError, StageError
from vllm_omni.executor.omni_executor import OmniExecutor
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.executor.recovery import Recovery

ROOT = Path(__file__).parents[2]
A_MOMENT_S = 0.5  # the most that one step of the loop may take on a machine that others use too
SOON_S = 2.0  # in which a death or a stop is noticed, with as much for a busy machine


def loop_of(worker_timeout: float = 30.0, **options: Any) -> OmniExecutor:
    stages = {"text": toy_stage("text", "apart_text", executor="process", **options)}
    return OmniExecutor(Pipeline(toy_config(stages=stages, outputs=("text",), worker_timeout=worker_timeout)))


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    """One stage in a process of its own; each test leaves it ready."""
    before = children()  # of other files' tests
    driver = Driver(loop_of(step_s=0.01, load_s=0.3))  # so that one can die while it loads
    yield driver
    driver.loop.shutdown()
    assert children() <= before


@pytest.fixture(autouse=True)
def ready(driver: Driver) -> None:
    driver.until_ready("text")
    name = f"warm{time.monotonic()}"
    assert driver.answer(request(name, "x")).text == "xx"
    driver.longest_s = 0.0


def pid(driver: Driver) -> int:
    found = driver.loop.get_status()["stages"]["text"]["pid"]
    assert isinstance(found, int)
    return found


def num_rebuilds(driver: Driver) -> int:
    found = driver.loop.get_status()["stages"]["text"]["num_rebuilds"]
    assert isinstance(found, int)
    return found


def until_it_works(driver: Driver) -> None:
    """It has the id that it had, and sleeps in its steps."""
    driver.until(lambda: any(not output.finished for output in driver.outputs))


def test_a_process_that_is_killed_at_work_is_replaced_and_its_streams_go_on_where_they_stopped(driver: Driver) -> None:
    first = pid(driver)
    driver.outputs.clear()
    for name in ("a", "b"):
        driver.loop.add_request(request(name, name, params=TextParams(steps=40)), stream=True)
    until_it_works(driver)
    os.kill(first, signal.SIGKILL)
    begin = time.monotonic()
    driver.until(lambda: driver.loop.get_status()["stages"]["text"]["state"] == "rebuilding")
    assert time.monotonic() - begin < SOON_S
    assert f"its process {first} was killed by SIGKILL" in driver.loop.get_status()["stages"]["text"]["cause"]
    driver.until(lambda: driver.final("a") and driver.final("b"))
    for name in ("a", "b"):
        output = driver.final(name)
        assert output is not None and output.error is None and output.metrics["text"]["retried"] == 1
        parts = [part.text or "" for part in driver.outputs if part.request_id == name and not part.finished]
        assert "".join(parts) == output.text == 40 * name
    assert pid(driver) != first and first not in children()
    assert driver.longest_s < A_MOMENT_S


def test_a_process_that_is_killed_while_it_loads_is_started_again(driver: Driver) -> None:
    before, first = num_rebuilds(driver), pid(driver)
    os.kill(first, signal.SIGKILL)
    driver.until(lambda: num_rebuilds(driver) > before and driver.loop.get_status()["stages"]["text"]["pid"])
    assert driver.loop.get_status()["stages"]["text"]["state"] == "rebuilding"
    os.kill(pid(driver), signal.SIGKILL)
    driver.until_ready("text")
    assert num_rebuilds(driver) == before + 2 and pid(driver) != first


@pytest.mark.parametrize(
    ("do", "words"),
    [
        ("garbage", "sent what is no message: got"),
        ("segfault", r"was killed by SIGSEGV; the last that it wrote: Fatal Python error: Segmentation fault"),
        ("exit", "its process was ended by SystemExit: leaving"),
    ],
)
def test_a_process_that_lies_or_crashes_says_why(driver: Driver, do: str, words: str) -> None:
    params = TextParams(do="exit") if do == "exit" else TextParams()
    output = driver.answer(request(f"bad {do}", f"do={do}", params=params))
    assert words in str(output.error) and "Extension modules" not in str(output.error)
    assert driver.longest_s < A_MOMENT_S


def test_a_step_that_raises_or_makes_what_cannot_be_sent_fails_its_tasks_alone(driver: Driver) -> None:
    first = pid(driver)
    raised = driver.answer(request("raises", params=TextParams(do="raise")))
    assert "RuntimeError: boom" in str(raised.error)
    cause = raised.error.__cause__
    assert isinstance(cause, RuntimeError) and "toy_engine.py" in str(cause.__cause__), "the lines where it was raised"
    assert driver.answer(request("good", "x")).text == "xx"
    odd = driver.answer(request("odd", "do=odd"))
    assert "got a builtins.object, which cannot be sent to another process" in str(odd.error)
    assert driver.answer(request("good2", "x")).text == "xx"
    lost = driver.answer(request("no memory", params=TextParams(do="no_memory")))
    assert "out of memory" in str(lost.error) and driver.answer(request("good3", "x")).text == "xx"
    assert pid(driver) == first


def test_a_request_that_cannot_be_sent_is_refused_alone(driver: Driver) -> None:
    first = pid(driver)
    asked = request("bad", [{"role": "user", "content": [{"type": "text", "text": "x", "more": open}]}])
    assert "cannot be sent to another process" in str(driver.answer(asked).error)
    assert driver.answer(request("good", "x")).text == "xx" and pid(driver) == first


def test_log_lines_and_prints_come_through(
    driver: Driver, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.WARNING, "vllm_omni.toy"):
        driver.answer(request("logs", "do=log"))
        driver.answer(request("prints", "do=print"))
    assert "text: step of logs" in caplog.text
    driver.until(lambda: "printed by prints" in capfd.readouterr().err, 5.0)


def test_nobody_waits_for_a_process_that_does_not_read(driver: Driver) -> None:
    """More orders than a socket holds; then it is given up, since it is stopped, and all are run by the next."""
    os.kill(pid(driver), signal.SIGSTOP)
    begin = time.monotonic()
    for number in range(30):
        driver.loop.add_request(request(f"r{number}", "x" * 12_000))
    driver.loop.step()
    executor: Any = driver.loop._stages["text"].hosts[0].executor
    assert executor._connection.has_unsent
    assert time.monotonic() - begin < A_MOMENT_S
    driver.until(lambda: driver.loop.get_status()["stages"]["text"]["state"] == "rebuilding")
    assert time.monotonic() - begin < SOON_S and "was stopped" in driver.loop.get_status()["stages"]["text"]["cause"]
    driver.until(lambda: all(driver.final(f"r{number}") for number in range(30)))
    assert all(driver.final(f"r{number}").metrics["text"]["retried"] == 1 for number in range(30))  # type: ignore[union-attr]
    assert driver.longest_s < A_MOMENT_S


def test_aborts_free_what_the_process_holds(driver: Driver) -> None:
    for number in range(50):
        driver.loop.add_request(request(f"a{number}", params=TextParams(steps=1000)))
        driver.outputs += driver.loop.step()
        driver.loop.abort(f"a{number}")
    driver.loop.take_outputs()
    driver.outputs.clear()
    assert driver.answer(request("a0", "x")).text == "xx", "an id can be used again"
    driver.loop.check_integrity()
    assert driver.loop.get_metrics()["stages"]["text"]["steps"] > 0


def test_what_keeps_a_stage_from_loading_is_said_and_leaves_nothing_behind() -> None:
    before = descriptors(), children(), threading.active_count()
    with pytest.raises(StageError, match="RuntimeError: weights are on fire"):
        loop_of(fails_to_load=True)
    until = time.monotonic() + 5
    while (descriptors(), children(), threading.active_count()) != before and time.monotonic() < until:
        time.sleep(0.01)
    assert (descriptors(), children(), threading.active_count()) == before


def test_a_step_that_hangs_and_shutdown_leave_no_descriptor_no_thread_and_no_process() -> None:
    before = descriptors(), children(), threading.active_count()
    driver = Driver(loop_of(worker_timeout=0.5))
    hangs, first = driver.answer(request("hangs", params=TextParams(do="block"))), pid(driver)
    assert "no progress for" in str(hangs.error) and driver.longest_s < A_MOMENT_S
    driver.until_ready("text")
    assert driver.answer(request("works again", "x")).error is None and pid(driver) != first
    driver.loop.shutdown()
    driver.loop.shutdown()
    assert (descriptors(), children(), threading.active_count()) == before
    with pytest.raises(OmniError):
        driver.loop.add_request(request())


def test_a_process_that_dies_or_is_stopped_while_an_async_caller_rests_is_replaced_unasked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody asks for a status or sends a request, either of which would look at the process."""
    found: Queue[tuple[float, str]] = Queue()
    begin = Recovery.begin

    def begun(recovery: Recovery, cause: Exception, now: float) -> None:
        begin(recovery, cause, now)
        found.put((time.monotonic(), str(cause)))

    monkeypatch.setattr(Recovery, "begin", begun)
    stages = {"text": toy_stage("text", "apart_text", executor="process")}
    omni = AsyncOmni(toy_config(stages=stages, outputs=("text",)))
    status = omni.get_status()["stages"]["text"]
    for sign, words in ((signal.SIGSTOP, "was stopped"), (signal.SIGKILL, "was killed by SIGKILL")):
        os.kill(first := status["pid"], sign)
        sent = time.monotonic()
        seen, cause = found.get(timeout=10)
        assert seen - sent < SOON_S and f"its process {first} {words}" in cause
        until = time.monotonic() + 10
        while sign == signal.SIGSTOP and (status := omni.get_status()["stages"]["text"])["state"] != "ready":
            assert time.monotonic() < until, status
            time.sleep(0.01)
    asyncio.run(omni.shutdown())


PARENT = """
import sys, time
import support.apart_stages
from support.toy_engine import toy_config, toy_stage
from vllm_omni.executor.omni_executor import OmniExecutor
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.executor.recovery import Recovery
stages = {"text": toy_stage("text", "apart_text", executor="process")}
loop = OmniExecutor(Pipeline(toy_config(stages=stages, outputs=("text",))))
print(loop.get_status()["stages"]["text"]["pid"], flush=True)
time.sleep(60)
"""


def test_no_process_outlives_its_parent() -> None:
    """Not even one that is stopped."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, env=environment, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    os.kill(child, signal.SIGSTOP)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until = time.monotonic() + 5
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < until:
            os.kill(child, 0)
            if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return  # only whoever reaps orphans here has not done so yet
            time.sleep(0.02)
        raise AssertionError("it lives")
