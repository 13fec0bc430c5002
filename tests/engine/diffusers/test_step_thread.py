"""A function in a thread of its own as a coroutine: turns, results, errors, no thread left behind."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from vllm_omni.engine.diffusers.step_thread import StepThread

Pause = Callable[[], None]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def test_the_two_threads_take_turns() -> None:
    seen: list[str] = []

    def work(pause: Pause) -> int:
        for number in range(3):
            seen.append(f"work {number}")
            pause()
        return 7

    thread = StepThread(work, "work")
    assert seen == [], "nothing runs before it is resumed"
    for number in range(3):
        assert not thread.resume()
        seen.append(f"owner {number}")
    assert thread.resume() and thread.result() == 7
    assert seen == ["work 0", "owner 0", "work 1", "owner 1", "work 2", "owner 2"]


def test_it_runs_in_a_thread_of_its_own_that_ends_with_the_function() -> None:
    thread = StepThread(lambda pause: threading.current_thread(), "a name")
    assert thread.resume()
    ran_in = thread.result()
    assert ran_in is not threading.current_thread() and ran_in.name == "a name" and not ran_in.is_alive()


def test_what_the_function_raises_is_raised_by_result() -> None:
    def fail(pause: Pause) -> None:
        pause()
        raise KeyError("why")

    thread = StepThread(fail, "fail")
    assert not thread.resume() and thread.resume()
    with pytest.raises(KeyError, match="why"):
        thread.result()


def test_close_raises_inside_the_pause_and_waits_for_the_end() -> None:
    seen: list[str] = []

    def stubborn(pause: Pause) -> None:
        try:
            pause()
        except Exception:
            seen.append("swallowed")
        finally:
            seen.append("cleaned up")
            pause()  # also refused: nobody will come back
            seen.append("went on")

    thread = StepThread(stubborn, "stubborn")
    thread.resume()
    thread.close()
    assert seen == ["cleaned up"]
    thread.close()
    with pytest.raises(RuntimeError, match="ended"):
        thread.resume()


def test_what_was_never_resumed_never_runs() -> None:
    ran: list[int] = []
    thread = StepThread(lambda pause: ran.append(1), "never")
    thread.close()
    assert not ran


def test_a_forgotten_coroutine_ends_its_thread() -> None:
    def wait(pause: Pause) -> None:
        pause()

    thread = StepThread(wait, "wait")
    thread.resume()
    running = [one for one in threading.enumerate() if one.name == "wait"]
    assert len(running) == 1
    del thread
    gc.collect()
    assert not running[0].is_alive()


def test_an_interrupted_wait_loses_no_turn() -> None:
    may_go = threading.Event()

    def work(pause: Pause) -> str:
        may_go.wait()
        pause()
        return "done"

    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        thread = StepThread(work, "work")
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            thread.resume()
        may_go.set()
        assert not thread.resume(), "the pause that was under way"
        assert thread.resume() and thread.result() == "done"
        may_go.clear()
        abandoned = StepThread(work, "work")
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            abandoned.resume()
        may_go.set()
        abandoned.close()
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_result_before_the_end_is_our_own_mistake() -> None:
    thread = StepThread(lambda pause: pause(), "early")
    thread.resume()
    with pytest.raises(RuntimeError, match="before its end"):
        thread.result()
    thread.close()
