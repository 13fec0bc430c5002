"""The adapters of one loaded model, within a budget of bytes. Those that a running request uses stay; of the others the
least recently used go first. Shared by all stages that run the model, in whatever threads.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence

from vllm_omni.errors import CacheError
from vllm_omni.layers.lora import Adapter
from vllm_omni.worker.lora.plan import LoRAPlan

Load = Callable[[LoRAPlan], Adapter]


class AdapterPool:
    """Adapters under the keys of their files; owners (requests) hold those that they use."""

    def __init__(self, max_bytes: int, itemsize: int, load: Load) -> None:
        """itemsize: of a number of a loaded adapter."""
        self.max_bytes = max_bytes
        self._itemsize = itemsize
        self._load = load
        self._adapters: OrderedDict[str, Adapter] = OrderedDict()
        self._held: dict[Hashable, tuple[str, ...]] = {}  # owner -> keys
        self.num_loads = self._num_hits = self._num_evictions = 0
        self._lock = threading.Lock()

    @property
    def used_bytes(self) -> int:
        return sum(adapter.num_bytes for adapter in self._adapters.values())

    def has_room(self, plans: Sequence[LoRAPlan]) -> bool:
        """Whether `acquire` would succeed now."""
        with self._lock:
            return self._fits(plans)

    def acquire(self, owner: Hashable, plans: Sequence[LoRAPlan]) -> list[Adapter] | None:
        """The adapters of these files, loaded where they are not, and kept until `release`. None, and nothing held,
        where there is no room beside those that others hold. What is wrong with a file is raised, and nothing held.
        """
        with self._lock:
            if owner in self._held:
                raise CacheError(f"owner {owner!r} holds adapters already")
            if not self._fits(plans):
                return None
            keys = tuple(plan.file.key for plan in plans)
            self._held[owner] = keys
            try:
                return [self._get(plan) for plan in plans]
            except BaseException:
                del self._held[owner]
                raise

    def release(self, owner: Hashable) -> None:
        """Unknown owners are fine."""
        with self._lock:
            self._held.pop(owner, None)

    def get_stats(self) -> Mapping[str, int]:
        with self._lock:
            return {
                "loaded": len(self._adapters),
                "used_bytes": self.used_bytes,
                "max_bytes": self.max_bytes,
                "owners": len(self._held),
                "loads": self.num_loads,
                "hits": self._num_hits,
                "evictions": self._num_evictions,
            }

    def check_integrity(self) -> None:
        """CacheError when something is held that is not there, or there is too much."""
        with self._lock:
            lost = self._in_use() - self._adapters.keys()
            if lost:
                raise CacheError(f"{len(lost)} adapters are held, but not loaded")
            if self.used_bytes > self.max_bytes:
                raise CacheError(f"adapters of {self.used_bytes} bytes, the budget is {self.max_bytes}")

    def _in_use(self) -> set[str]:
        return {key for keys in self._held.values() for key in keys}

    def _fits(self, plans: Sequence[LoRAPlan]) -> bool:
        sizes = {plan.file.key: plan.num_bytes(self._itemsize) for plan in plans}
        pinned = {key: self._adapters[key].num_bytes for key in self._in_use()}
        return sum({**sizes, **pinned}.values()) <= self.max_bytes

    def _get(self, plan: LoRAPlan) -> Adapter:
        key = plan.file.key
        found = self._adapters.get(key)
        if found is not None:
            self._num_hits += 1
            self._adapters.move_to_end(key)
            return found
        self._make_room(plan.num_bytes(self._itemsize))
        adapter = self._adapters[key] = self._load(plan)
        self.num_loads += 1
        return adapter

    def _make_room(self, num_bytes: int) -> None:
        in_use = self._in_use()
        while self.used_bytes + num_bytes > self.max_bytes:
            oldest = next(key for key in self._adapters if key not in in_use)
            del self._adapters[oldest]
            self._num_evictions += 1
