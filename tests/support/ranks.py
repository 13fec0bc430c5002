"""Ranks that are threads of this process, connected by real gloo: what processes add is tested with processes."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_omni import registry
from vllm_omni.config.schema import ParallelConfig
from vllm_omni.worker.parallel.layout import Place
from vllm_omni.worker.parallel.links import Links
from vllm_omni.worker.parallel.ranks import Meeting

CPU = torch.device("cpu")
TIMEOUT = timedelta(seconds=30)


class ThreadGroup:
    """What a ParallelGroup is to a model. Followers compute what `orders` describe."""

    def __init__(self, config: ParallelConfig, orders: Mapping[str, Any]) -> None:
        self.links = Links(Place(config, 0), CPU)
        self.errors: list[Exception] = []
        self._folder = tempfile.TemporaryDirectory()
        self._meeting = Meeting(Path(self._folder.name) / "ranks", config.size)
        self._threads = [
            threading.Thread(target=self._follow, args=(Place(config, rank), orders), daemon=True)
            for rank in range(1, config.size)
        ]
        for thread in self._threads:
            thread.start()

    def connect(self) -> None:
        self.links.connect(self._meeting, TIMEOUT)

    def send(self, plain: Any, tensors: Sequence[Tensor]) -> None:
        self.links.send(plain, tensors)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        yield

    def close(self) -> None:
        self.links.send(None, [])
        for thread in self._threads:
            thread.join(5)
        self._folder.cleanup()
        assert not self.errors, self.errors

    def _follow(self, place: Place, orders: Mapping[str, Any]) -> None:
        try:
            links = Links(place, CPU)
            with torch.inference_mode():
                part = registry.resolve("follower part", orders["kind"])(orders, links)
                links.connect(self._meeting, TIMEOUT)
                while (message := links.receive())[0] is not None:
                    part.step(*message)
        except Exception as error:
            self.errors.append(error)
