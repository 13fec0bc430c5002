"""The ranks of one process group: what they sum, gather and exchange within a model, over gloo where a CPU computes and
NCCL between CUDA devices. Knows no processes and no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor

from vllm_omni.utils.device import is_cuda

LOOPBACK = "127.0.0.1"
FOREVER = timedelta(days=300)  # how long a rank may wait for its next step
START = timedelta(seconds=120)  # how long ranks that are loaded may take to connect


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where ranks find each other: a file in a folder that nobody else may enter, and loopback addresses in it."""

    file: Path
    size: int  # of all ranks

    def store(self) -> Any:
        """One per rank."""
        return distributed.FileStore(str(self.file), self.size)  # type: ignore[attr-defined]


class Ranks:
    """Some ranks, of which this process is one: Peers, once they are connected. Every sum is the same on every rank,
    bit for bit, and over gloo a row's does not depend on the other rows: parts are added in the order of the ranks.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self._group: Any = None
        self._is_gloo = True

    def connect(self, store: Any, name: str, device: torch.device) -> None:
        """Returns when this rank is connected; others may still read the store."""
        store = distributed.PrefixStore(name, store)  # type: ignore[attr-defined]
        self._is_gloo = not is_cuda(device)
        if self._is_gloo:
            options = distributed.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._devices = [distributed.ProcessGroupGloo.create_device(hostname=LOOPBACK, lazy_init=False)]
            options._timeout = START
            self._group = distributed.ProcessGroupGloo(store, self.rank, self.size, options)
        else:
            options = distributed.ProcessGroupNCCL.Options()
            options._timeout = START
            self._group = distributed.ProcessGroupNCCL(store, self.rank, self.size, options)

    def limit(self, timeout: timedelta) -> None:
        """How long any later operation may take; before, it is START."""
        self._group._set_default_timeout(timeout)

    def disconnect(self) -> None:
        """Ends operations that wait for a rank that is gone; gloo's end by themselves."""
        group, self._group = self._group, None
        if group is not None and not self._is_gloo:
            group.abort()

    def sum(self, partial: Tensor) -> Tensor:
        if not self._is_gloo:
            total = partial.clone()
            self._group.allreduce([total]).wait()
            return total
        first, *others = self.gather(partial)
        total = first.float()
        for other in others:
            total = total + other
        return total.to(partial.dtype)

    def gather(self, part: Tensor) -> list[Tensor]:
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(self.size)]
        self._group.allgather([parts], [part]).wait()
        return parts

    def exchange(self, parts: Tensor) -> Tensor:
        parts = parts.contiguous()
        found = torch.empty_like(parts)
        self._group.alltoall_base(found, parts, [], []).wait()
        return found

    def broadcast(self, tensor: Tensor) -> None:
        """From the first rank into the tensors of all others, in place."""
        options = distributed.BroadcastOptions()
        options.rootRank = 0
        self._group.broadcast([tensor], options).wait()
