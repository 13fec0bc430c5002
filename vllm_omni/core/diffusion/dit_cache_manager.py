"""The byte budget of what DiT stages keep: step caches of running samples, prompt embeddings that outlive a request.

One instance is one budget. What an owner has reserved stays until it is released; everything else is evicted least
recently used first. It knows keys and sizes, not what the values mean.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
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
    owner: Hashable | None  # whose reservation it counts against; None: it may be evicted


class DiTCacheManager:
    """Values under hashable keys and reservations under owners, at most a budget together.

    The budget is the config's `max_memory_mb`, or `max_bytes` where that is given.
    """

    def __init__(self, config: DiTCacheConfig | None = None, *, max_bytes: int | None = None) -> None:
        if max_bytes is None:
            max_bytes = budget_bytes(config or DiTCacheConfig())
        if max_bytes < 0:
            raise CacheError(f"max_bytes: got {max_bytes}, expected at least 0")
        self.max_bytes = max_bytes
        self.used_bytes = 0  # of reservations, filled or not, and of entries without an owner
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._reserved: dict[Hashable, int] = {}
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

    def peek(self, key: Hashable) -> Any | None:
        """As `get_cache`, but a look that counts as none."""
        entry = self._entries.get(key)
        return None if entry is None else entry.value

    def set_cache(
        self, key: Hashable, value: Any, num_bytes: int | None = None, *, owner: Hashable | None = None
    ) -> bool:
        """Keeps `value`, evicting others as needed. False (and nothing kept under `key`) when it does not fit beside
        what is reserved.

        num_bytes: its size; None measures a tensor, or a mapping or sequence of tensors. owner: has reserved the space;
        the value is never evicted, and CacheError where the reservation is too small or there is none.
        """
        num_bytes = measured_bytes(value) if num_bytes is None else num_bytes
        if num_bytes < 0:
            raise CacheError(f"num_bytes of {key!r}: got {num_bytes}, expected at least 0")
        self.invalidate_cache(key)
        if owner is not None:
            self._check_reservation(owner, num_bytes)
        elif self._make_room(num_bytes):
            self.used_bytes += num_bytes
        else:
            self._refused += 1
            return False
        self._entries[key] = _Entry(value, num_bytes, owner)
        return True

    def invalidate_cache(self, key: Hashable) -> bool:
        """Frees one value; whether there was one."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return False
        if entry.owner is None:
            self.used_bytes -= entry.num_bytes
        return True

    def reserve(self, owner: Hashable, num_bytes: int) -> bool:
        """Sets bytes aside for the values of one owner, evicting others as needed. False, and nothing reserved, when
        they do not fit beside the other reservations; after some of those are released they may.
        """
        if owner in self._reserved:
            raise CacheError(f"owner {owner!r} has reserved {self._reserved[owner]} bytes already")
        if num_bytes < 0:
            raise CacheError(f"num_bytes of {owner!r}: got {num_bytes}, expected at least 0")
        if not self._make_room(num_bytes):
            return False
        self._reserved[owner] = num_bytes
        self.used_bytes += num_bytes
        return True

    def release(self, owner: Hashable) -> bool:
        """Frees a reservation and all values in it; whether there was one."""
        num_bytes = self._reserved.pop(owner, None)
        if num_bytes is None:
            return False
        self.used_bytes -= num_bytes
        for key in [key for key, entry in self._entries.items() if entry.owner == owner]:
            del self._entries[key]
        return True

    def get_hit_rate(self) -> float:
        """Hits over look-ups, 0 before the first."""
        lookups = self._hits + self._misses
        return self._hits / lookups if lookups else 0.0

    def get_stats(self) -> dict[str, float]:
        return {
            "entries": len(self._entries),
            "used_bytes": self.used_bytes,
            "reserved_bytes": sum(self._reserved.values()),
            "max_bytes": self.max_bytes,
            "hits": self._hits,
            "misses": self._misses,
            "evictions": self._evictions,
            "refused": self._refused,
            "hit_rate": self.get_hit_rate(),
        }

    def check_integrity(self) -> None:
        """Raises CacheError when the bytes do not add up, or an owner holds what it has not reserved."""
        held = dict.fromkeys(self._reserved, 0)
        total = sum(self._reserved.values())
        for key, entry in self._entries.items():
            if entry.owner is None:
                total += entry.num_bytes
            elif entry.owner not in held:
                raise CacheError(f"{key!r}: its owner {entry.owner!r} has no reservation")
            else:
                held[entry.owner] += entry.num_bytes
        if total != self.used_bytes or total > self.max_bytes:
            raise CacheError(
                f"entries and reservations are {total} bytes, counted are {self.used_bytes},"
                f" the budget is {self.max_bytes}"
            )
        over = [owner for owner, num_bytes in held.items() if num_bytes > self._reserved[owner]]
        if over:
            raise CacheError(f"owner {over[0]!r}: holds {held[over[0]]} bytes, reserved {self._reserved[over[0]]}")

    def _check_reservation(self, owner: Hashable, num_bytes: int) -> None:
        held = sum(entry.num_bytes for entry in self._entries.values() if entry.owner == owner)
        reserved = self._reserved.get(owner, 0)
        if held + num_bytes > reserved:
            raise CacheError(f"owner {owner!r}: got {held + num_bytes} bytes, expected at most the {reserved} reserved")

    def _make_room(self, num_bytes: int) -> bool:
        """Evicts until so many bytes are free; evicts nobody where they cannot be."""
        if sum(self._reserved.values()) + num_bytes > self.max_bytes:
            return False
        while self.used_bytes + num_bytes > self.max_bytes:
            self.invalidate_cache(next(key for key, entry in self._entries.items() if entry.owner is None))
            self._evictions += 1
        return True


def budget_bytes(config: DiTCacheConfig) -> int:
    """`max_memory_mb` in bytes."""
    return int(config.max_memory_mb * MEGABYTE)


def measured_bytes(value: Any) -> int:
    """Bytes of a tensor, of all tensors in a mapping or sequence, or of any other object by itself."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(measured_bytes, value.values()))
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return sum(map(measured_bytes, value))
    return sys.getsizeof(value)
