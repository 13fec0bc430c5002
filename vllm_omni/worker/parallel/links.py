"""All process groups that one rank is a member of, and the messages from the first rank to the others. Knows no model
and no process.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from vllm_omni.layers.shard import WHOLE, Shard
from vllm_omni.utils.device import is_cuda
from vllm_omni.worker.parallel.frame import DTYPES, decode, encode, length_of
from vllm_omni.worker.parallel.layout import AXES, Axis, Place
from vllm_omni.worker.parallel.ranks import FOREVER, Meeting, Ranks

FIRST_BYTES = 32 * 1024  # of a message, which come in one broadcast; most messages are no longer
CONTROL = torch.device("cpu")


class Links:
    """Of one rank. Its shards can be built into layers before `connect`."""

    def __init__(self, place: Place, device: torch.device) -> None:
        self.place = place
        self.device = device
        self.all = Ranks(place.rank, place.config.size)  # tensors, on the device
        self._control = Ranks(place.rank, place.config.size)  # messages, from the host's memory
        self._lines = {axis: self._line(axis) for axis in AXES if getattr(place.config, axis) > 1}

    def shard(self, axis: Axis) -> Shard:
        """This rank's share along an axis."""
        ranks = self._lines.get(axis)
        return WHOLE if ranks is None else Shard(ranks.rank, ranks.size, ranks)

    def connect(self, meeting: Meeting, timeout: timedelta) -> None:
        """Returns when all ranks have called it. timeout: of an operation within a step."""
        store = meeting.store()
        is_first = self.place.rank == 0  # the others wait for its messages between steps, too
        self._control.connect(store, "control", CONTROL)
        self.all.connect(store, "all", self.device)
        for axis, ranks in self._lines.items():
            first = self.place.line(axis)[0]
            ranks.connect(store, f"{axis}/{first}", self.device)
        self._control.gather(torch.zeros(1))  # all have met: the place may go
        for ranks in (self.all, *self._lines.values()):
            ranks.limit(timeout)
        self._control.limit(timeout if is_first else FOREVER)

    def disconnect(self) -> None:
        for ranks in (self._control, self.all, *self._lines.values()):
            ranks.disconnect()

    def send(self, plain: Any, tensors: Sequence[Tensor]) -> None:
        """From the first rank: one broadcast, a second where the message is long; tensors of a CUDA device one each."""
        there = [tensor.contiguous() for tensor in tensors if is_cuda(tensor.device)]
        shapes = [[str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for tensor in there]
        where = [is_cuda(tensor.device) for tensor in tensors]
        frame = encode([plain, where, shapes], [tensor for tensor in tensors if not is_cuda(tensor.device)])
        first = torch.zeros(FIRST_BYTES, dtype=torch.uint8)
        first[: min(len(frame), FIRST_BYTES)] = frame[:FIRST_BYTES]
        self._control.broadcast(first)
        if len(frame) > FIRST_BYTES:
            self._control.broadcast(frame[FIRST_BYTES:])
        for tensor in there:
            self.all.broadcast(tensor)

    def receive(self) -> tuple[Any, list[Tensor]]:
        """At the others: waits for what the first rank sends; tensors are on this rank's device."""
        frame = torch.zeros(FIRST_BYTES, dtype=torch.uint8)
        self._control.broadcast(frame)
        length = length_of(frame)
        if length > FIRST_BYTES:
            rest = torch.empty(length - FIRST_BYTES, dtype=torch.uint8)
            self._control.broadcast(rest)
            frame = torch.cat([frame, rest])
        (plain, where, shapes), found = decode(frame[:length])
        there = [torch.empty(shape, dtype=DTYPES[name], device=self.device) for name, shape in shapes]
        for tensor in there:
            self.all.broadcast(tensor)
        sources = {True: iter(there), False: iter(found)}
        return plain, [next(sources[is_there]).to(self.device) for is_there in where]

    def _line(self, axis: Axis) -> Ranks:
        line = self.place.line(axis)
        return Ranks(line.index(self.place.rank), len(line))
