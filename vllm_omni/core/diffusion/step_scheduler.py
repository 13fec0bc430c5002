"""Which jobs of a diffusion stage take the next denoising step. Pure: it knows sizes in tokens, not what a job is.

Jobs run in order of arrival, as many together as the token budget and the batch size allow; a job that is in stays
in until it is done.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

from vllm_omni.errors import SchedulerError

Job = TypeVar("Job")


class StepScheduler(Generic[Job]):
    """`max_tokens` and `max_jobs` bound one step's batch; a job larger than `max_tokens` runs alone."""

    def __init__(self, max_tokens: int, max_jobs: int) -> None:
        self.max_tokens = max_tokens
        self.max_jobs = max_jobs
        self._waiting: deque[tuple[str, int, Job]] = deque()
        self._running: dict[str, tuple[int, Job]] = {}

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running)

    def add(self, key: str, num_tokens: int, job: Job) -> None:
        """Queues a job under a key of its own. num_tokens: what one of its steps puts through the model."""
        if num_tokens < 1:
            raise SchedulerError(f"job {key!r}: got {num_tokens} tokens, expected at least 1")
        if key in self._running or any(key == waiting for waiting, _, _ in self._waiting):
            raise SchedulerError(f"job {key!r} is already here")
        self._waiting.append((key, num_tokens, job))

    def schedule(self) -> list[Job]:
        """The jobs of the next step: those that run, then waiting ones as long as they fit, in order of arrival."""
        used = sum(num_tokens for num_tokens, _ in self._running.values())
        while self._waiting and len(self._running) < self.max_jobs:
            key, num_tokens, job = self._waiting[0]
            if self._running and used + num_tokens > self.max_tokens:
                break
            self._waiting.popleft()
            self._running[key] = (num_tokens, job)
            used += num_tokens
        return [job for _, job in self._running.values()]

    def remove(self, key: str) -> bool:
        """Forgets a job, done or not; whether it was here."""
        if self._running.pop(key, None) is not None:
            return True
        before = len(self._waiting)
        self._waiting = deque(entry for entry in self._waiting if entry[0] != key)
        return len(self._waiting) < before

    def check_integrity(self) -> None:
        """Raises SchedulerError when a job is held twice or the running batch is over its bounds."""
        keys = [key for key, _, _ in self._waiting] + list(self._running)
        used = sum(num_tokens for num_tokens, _ in self._running.values())
        if len(keys) != len(set(keys)) or len(self._running) > self.max_jobs:
            raise SchedulerError("a job is held twice, or too many run")
        if used > self.max_tokens and len(self._running) > 1:
            raise SchedulerError(f"{used} tokens run, the budget is {self.max_tokens}")
