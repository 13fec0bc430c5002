"""Which samples of a diffusion stage take the next denoising step, and the memory of their step caches. Pure: it knows
sizes in tokens and bytes, not what a sample is.

Samples run in order of arrival, as many together as the token budget, the batch size and the cache's memory allow. One
that is in stays in until it is removed, or while others wait, until its turn is over: then it stands behind them, so
that small ones need not wait for the end of a large one. A turn is long: what needs less work is done in one.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

from vllm_omni.core.diffusion.dit_cache_manager import DiTCacheManager
from vllm_omni.errors import ResourceError, SchedulerError

Sample = TypeVar("Sample")

TURN_BATCHES = 8  # full batches whose tokens a sample may compute in one turn


@dataclass(slots=True)
class _Entry(Generic[Sample]):
    sample: Sample
    num_tokens: int  # of one of its steps
    cache_bytes: int  # that its step cache may ever hold
    has_cache: bool = False  # whether these are reserved
    num_computed: int = 0  # tokens in this turn


class StepScheduler(Generic[Sample]):
    """`max_tokens` and `max_samples` bound one step's batch; a sample larger than `max_tokens` runs alone.

    A sample's step cache is reserved in `caches`, under the sample's key, from the moment it starts until it is
    removed: nothing that comes later takes it away.
    """

    def __init__(self, max_tokens: int, max_samples: int, caches: DiTCacheManager) -> None:
        self.max_tokens = max_tokens
        self.max_samples = max_samples
        self._caches = caches
        self._waiting: deque[tuple[str, _Entry[Sample]]] = deque()
        self._running: dict[str, _Entry[Sample]] = {}

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running)

    def add(self, key: str, sample: Sample, num_tokens: int, cache_bytes: int = 0) -> None:
        """Queues a sample under a key of its own; ResourceError for one that could never start.

        num_tokens: what one of its steps puts through the model. cache_bytes: the most its step cache may hold.
        """
        if num_tokens < 1:
            raise SchedulerError(f"sample {key!r}: got {num_tokens} tokens, expected at least 1")
        if key in self._running or any(key == waiting for waiting, _ in self._waiting):
            raise SchedulerError(f"sample {key!r} is already here")
        if cache_bytes > self._caches.max_bytes:
            raise ResourceError(
                f"dit_cache.max_memory_mb: the step cache of this request needs {cache_bytes} bytes, expected at most"
                f" {self._caches.max_bytes}; raise it, ask for something smaller, or set cache.policy to none"
            )
        self._waiting.append((key, _Entry(sample, num_tokens, cache_bytes)))

    def schedule(self) -> list[Sample]:
        """The samples of the next step: those whose turn it is, then waiting ones as long as they fit, in their order.
        Where the step cache of one has no room, those pass it by that have theirs.
        """
        if self._waiting:
            self._end_turns()
        used = sum(entry.num_tokens for entry in self._running.values())
        left: list[tuple[str, _Entry[Sample]]] = []
        while self._waiting and len(self._running) < self.max_samples:
            key, entry = self._waiting[0]
            if self._running and used + entry.num_tokens > self.max_tokens:
                break
            self._waiting.popleft()
            if not entry.has_cache and (left or not self._reserve(key, entry)):
                left.append((key, entry))
                continue
            self._running[key] = entry
            used += entry.num_tokens
        self._waiting.extendleft(reversed(left))
        for entry in self._running.values():
            entry.num_computed += entry.num_tokens
        return [entry.sample for entry in self._running.values()]

    def remove(self, key: str) -> bool:
        """Drops a sample, done or not, and frees its step cache; whether it was here."""
        self._caches.release(key)
        if self._running.pop(key, None) is not None:
            return True
        before = len(self._waiting)
        self._waiting = deque(item for item in self._waiting if item[0] != key)
        return len(self._waiting) < before

    def check_integrity(self) -> None:
        """Raises SchedulerError when a sample is held twice or the running batch is over its bounds."""
        keys = [key for key, _ in self._waiting] + list(self._running)
        used = sum(entry.num_tokens for entry in self._running.values())
        if len(keys) != len(set(keys)) or len(self._running) > self.max_samples:
            raise SchedulerError("a sample is held twice, or too many run")
        if used > self.max_tokens and len(self._running) > 1:
            raise SchedulerError(f"{used} tokens run, the budget is {self.max_tokens}")
        self._caches.check_integrity()

    def _end_turns(self) -> None:
        turn = TURN_BATCHES * self.max_tokens
        for key, entry in list(self._running.items()):
            if entry.num_computed >= turn:
                entry.num_computed = 0
                self._waiting.append((key, self._running.pop(key)))

    def _reserve(self, key: str, entry: _Entry[Sample]) -> bool:
        entry.has_cache = entry.cache_bytes == 0 or self._caches.reserve(key, entry.cache_bytes)
        return entry.has_cache
