"""No call is lost, whenever it comes."""

from __future__ import annotations

import time

from vllm_omni.executor.wake import Wake


class CalledMeanwhile:
    """The end that `wait` reads, where another thread calls in the middle of that."""

    def __init__(self, wake: Wake) -> None:
        self._wake, self._end, self._is_first = wake, wake._reading, True

    def recv(self, size: int) -> bytes:
        if self._is_first:
            self._is_first = False
            self._wake()
        return self._end.recv(size)


def ends_at_once(wake: Wake) -> bool:
    started = time.monotonic()
    wake.wait(5.0)
    return time.monotonic() - started < 2.0


def test_a_call_while_a_wait_ends_leaves_later_ones_heard() -> None:
    wake = Wake()
    reading = wake._reading
    wake._reading = CalledMeanwhile(wake)  # type: ignore[assignment]
    wake()
    assert ends_at_once(wake)  # and looks for what there is to do, that of the call in between as well
    wake._reading = reading
    wake()
    assert ends_at_once(wake)
    wake.close()


def test_a_call_before_a_wait_ends_it_and_no_later_one() -> None:
    wake = Wake()
    wake()
    wake()
    assert ends_at_once(wake)
    started = time.monotonic()
    wake.wait(0.05)
    assert time.monotonic() - started >= 0.04
    wake.close()
