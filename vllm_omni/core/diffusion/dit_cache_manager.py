"""The byte budget of what DiT stages remember: step caches of running requests, prompt embeddings that outlive a
request.

One instance is one budget with least-recently-used eviction. It knows keys and sizes, not what the values mean.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vllm_omni.config.schema import DiTCacheConfig
from vllm_omni.errors import CacheError

MEGABYTE = 2**20


@dataclass(frozen=True, slots=True)
class _Entry:
    value: Any
    num_bytes: int


class DiTCacheManager:
    """Values under hashable keys, at most a budget together; the least recently used goes first.

    The budget is the config's `max_memory_mb`, or `max_bytes` where that is given.
    """

    def __init__(self, config: DiTCacheConfig | None = None, *, max_bytes: int | None = None) -> None:
        if max_bytes is None:
            max_bytes = int((config or DiTCacheConfig()).max_memory_mb * MEGABYTE)
        if max_bytes < 0:
            raise CacheError(f"max_bytes: got {max_bytes}, expected at least 0")
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._hits = self._misses = self._evictions = self._refused = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def get_cache(self, key: Hashable) -> Any | None:
        """The value under `key`, now the most recently used; None when there is none. Counts a hit or a miss."""
        entry = self._entries.get(key)
        if entry is None:
            self._misses += 1
            return None
        self._hits += 1
        self._entries.move_to_end(key)
        return entry.value

    def set_cache(self, key: Hashable, value: Any, num_bytes: int | None = None) -> bool:
        """Keeps `value`, evicting others as needed. False (and nothing kept under `key`) when it can never fit.

        num_bytes: what it takes; None measures a tensor, or a mapping or sequence of tensors.
        """
        num_bytes = measured_bytes(value) if num_bytes is None else num_bytes
        if num_bytes < 0:
            raise CacheError(f"num_bytes of {key!r}: got {num_bytes}, expected at least 0")
        self.invalidate_cache(key)
        if num_bytes > self.max_bytes:
            self._refused += 1
            return False
        while self.used_bytes + num_bytes > self.max_bytes:
            oldest = next(iter(self._entries))
            self.invalidate_cache(oldest)
            self._evictions += 1
        self._entries[key] = _Entry(value, num_bytes)
        self.used_bytes += num_bytes
        return True

    def invalidate_cache(self, key: Hashable) -> bool:
        """Forgets one value; whether there was one."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return False
        self.used_bytes -= entry.num_bytes
        return True

    def invalidate_where(self, predicate: Callable[[Hashable], bool]) -> int:
        """Forgets every value whose key satisfies `predicate`; how many there were."""
        return sum(self.invalidate_cache(key) for key in [key for key in self._entries if predicate(key)])

    def clear(self) -> None:
        """Forgets every value; the counters stay."""
        self._entries.clear()
        self.used_bytes = 0

    def get_hit_rate(self) -> float:
        """Hits over look-ups, 0 before the first."""
        lookups = self._hits + self._misses
        return self._hits / lookups if lookups else 0.0

    def get_stats(self) -> dict[str, float]:
        return {
            "entries": len(self._entries),
            "used_bytes": self.used_bytes,
            "max_bytes": self.max_bytes,
            "hits": self._hits,
            "misses": self._misses,
            "evictions": self._evictions,
            "refused": self._refused,
            "hit_rate": self.get_hit_rate(),
        }

    def check_integrity(self) -> None:
        """Raises CacheError when the books do not add up."""
        total = sum(entry.num_bytes for entry in self._entries.values())
        if total != self.used_bytes or total > self.max_bytes:
            raise CacheError(f"cache holds {total} bytes, books say {self.used_bytes}, budget is {self.max_bytes}")


def measured_bytes(value: Any) -> int:
    """Bytes of a tensor, of all tensors in a mapping or sequence, or of any other object by itself."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(measured_bytes, value.values()))
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return sum(map(measured_bytes, value))
    return sys.getsizeof(value)
