"""Loaded models, shared by every stage of this process that names the same weights, and the adapters of each. The pool
owns them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import TypeVar, cast

from vllm_omni.worker.lora.pool import AdapterPool

T = TypeVar("T")


class ModelPool:
    """Key (class, folder, device, dtype) -> the one loaded copy. Threads that ask for one key wait for the one of them
    that loads it.
    """

    def __init__(self) -> None:
        self._models: dict[Hashable, object] = {}
        self._locks: dict[Hashable, threading.Lock] = {}
        self._adapters: dict[Hashable, AdapterPool] = {}

    def get(self, key: Hashable, load: Callable[[], T]) -> T:
        """The model under `key`, loaded by `load` when it is asked for the first time."""
        with self._locks.setdefault(key, threading.Lock()):
            if key not in self._models:
                self._models[key] = load()
            return cast(T, self._models[key])

    def adapters(self, key: Hashable, make: Callable[[], AdapterPool]) -> AdapterPool:
        """The pool of adapters under `key`, which begins with its model's."""
        with self._locks.setdefault(key, threading.Lock()):
            if key not in self._adapters:
                self._adapters[key] = make()
            return self._adapters[key]

    def __len__(self) -> int:
        return len(self._models)

    def clear(self) -> None:
        """Forgets every model; engines that still hold one keep it alive."""
        self._models.clear()
        self._adapters.clear()
