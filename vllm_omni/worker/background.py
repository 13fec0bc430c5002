"""Work beside the loop that needs no model: decoding and resampling what a caller brings, in a few threads.

A stage begins a job, goes on, and looks in later steps whether it is done; the loop is woken when it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")
Stop = Callable[[], None]  # raises CancelledError in a job that nobody wants any more
NUM_THREADS = 2


class BackgroundJob(Generic[T]):
    """One job. Its result is read once `is_done`."""

    def __init__(self, future: Future[T], is_cancelled: threading.Event) -> None:
        self._future = future
        self._is_cancelled = is_cancelled

    @property
    def is_done(self) -> bool:
        return self._future.done()

    def result(self) -> T:
        """What the job returned, or raises what it raised."""
        return self._future.result(timeout=0)

    def cancel(self) -> None:
        """Nobody wants the result any more: a job that waits never runs, one that runs ends where it asks `stop`."""
        self._is_cancelled.set()
        self._future.cancel()


class Background:
    """A few threads, started with the first job. wake: called when a job is done, in that job's thread."""

    def __init__(self, wake: Callable[[], None] = lambda: None) -> None:
        self.wake = wake
        self._pool: ThreadPoolExecutor | None = None

    def begin(self, function: Callable[[Stop], T]) -> BackgroundJob[T]:
        """Runs `function(stop)`; a long one calls `stop` now and then."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="omni-background")
        is_cancelled = threading.Event()

        def stop() -> None:
            if is_cancelled.is_set():
                raise CancelledError

        future = self._pool.submit(function, stop)
        future.add_done_callback(lambda _: self.wake())
        return BackgroundJob(future, is_cancelled)

    def shutdown(self) -> None:
        """Cancels what waits and waits for no one; may be called twice."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None
