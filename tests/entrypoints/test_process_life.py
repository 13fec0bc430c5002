"""A loop that is forked, dropped, or still at work when the interpreter ends: in processes of their own."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import thread as pool
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.toy_engine import TextEngine, text_config, toy_config, toy_stage

from vllm_omni import AsyncOmni, Omni
from vllm_omni.entrypoints import dropping

BEGIN = """
import asyncio, os, sys
from vllm_omni import AsyncOmni, DiffusionParams
omni = AsyncOmni("tiny_image")
async def draw(steps):
    return await omni.generate("a red circle", DiffusionParams(num_inference_steps=steps, height=64, width=64))
"""
LEAVE = """
async def main():
    task = asyncio.ensure_future(draw(1000))
    await asyncio.sleep(0.5)
    sys.exit(3)
asyncio.run(main())
"""
DROP = """
import time
from vllm_omni import AsyncOmni, Omni
from vllm_omni.executor.omni_executor import OmniExecutor
shutdown = OmniExecutor.shutdown
def slow_shutdown(self):
    time.sleep(0.5)
    shutdown(self)
    print(self.owner, flush=True)
OmniExecutor.shutdown = slow_shutdown
def main():
    for kind in (Omni, AsyncOmni):
        kind("tiny_image")._executor.owner = kind.__name__
main()
"""
FORK = """
child = os.fork()
if not child:
    output = asyncio.run(draw(1))
    print(output.status.value, omni.get_status()["alive"], output.error, flush=True)
    os._exit(0)
os.waitpid(child, 0)
print(asyncio.run(draw(1)).status.value, omni.get_status()["alive"])
"""


def program(text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", text],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_the_interpreter_can_end_while_a_request_is_at_work() -> None:
    found = program(BEGIN + LEAVE)
    assert found.returncode == 3, found.stderr


def test_the_interpreter_ends_once_what_was_dropped_is_freed() -> None:
    """As where a script's `main` returns: a thread that frees tensors while the interpreter ends would abort it."""
    found = program(DROP)
    assert found.returncode == 0 and set(found.stdout.split()) == {"Omni", "AsyncOmni"}, found.stderr


class Owner:
    """Something to be dropped."""


def test_what_is_dropped_while_no_thread_can_be_started_is_ended_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As from Python 3.12 on while the interpreter ends."""

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    has_ended = threading.Event()
    owner = Owner()
    dropping.end_when_dropped(owner, has_ended.set)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        del owner
        assert has_ended.wait(10)
    dropping._wait()
    assert not dropping._under_way


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_is_refused_at_once_and_the_parent_goes_on() -> None:
    found = program(BEGIN + FORK)
    child, parent = found.stdout.splitlines()
    assert child.startswith("rejected False AsyncOmni was made before this process was forked off; make a new one")
    assert parent == "finished True", found.stderr


def threads() -> set[threading.Thread]:
    """Without that of tqdm, which stays once there was a bar."""
    return {thread for thread in threading.enumerate() if type(thread).__name__ != "TMonitor"}


@pytest.mark.parametrize("executor", ["inline", "thread"])
@pytest.mark.parametrize("kind", [partial(Omni, progress=False), AsyncOmni], ids=["Omni", "AsyncOmni"])
def test_what_is_dropped_frees_its_threads_and_its_engines(
    kind: Any, executor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[TextEngine]] = []
    create = TextEngine.__init__

    def note(self: TextEngine, *arguments: Any) -> None:
        create(self, *arguments)
        made.append(weakref.ref(self))

    monkeypatch.setattr(TextEngine, "__init__", note)
    before = threads()
    omni = kind(toy_config(stages={"text": toy_stage("text", "toy_text", executor=executor)}, outputs=("text",)))
    if isinstance(omni, Omni):
        assert omni.generate("a")[0].text == "aa"
    (held,) = made
    assert held() is not None
    del omni
    deadline = time.monotonic() + 10
    while (held() is not None or threads() - before) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert held() is None and not threads() - before


def test_the_collector_may_drop_one_while_any_lock_is_held() -> None:
    """As in the middle of `submit` of an executor of threads, all of which share a lock."""
    dropped = threading.Event()

    def drop() -> None:
        omni: list[Any] = [AsyncOmni(text_config())]
        omni.append(omni)
        with pool._global_shutdown_lock, omni[0]._loop._wake:
            del omni
            gc.collect()
        dropped.set()

    threading.Thread(target=drop, daemon=True).start()
    assert dropped.wait(10), "the collector waits for a lock that its own thread holds"
