"""What a loop whose stages are processes holds of the system: the same whenever nothing is done, whatever has been."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from support.belongings import children, descriptors, threads

from vllm_omni.executor.omni_executor import OmniExecutor

SHARED = "/memfd"  # the kind of descriptors of memory that processes share


@dataclass(frozen=True)
class Belongings:
    num_children: int
    descriptors: dict[str, int]
    threads: list[str]

    @classmethod
    def now(cls) -> Belongings:
        kinds = {kind: number for kind, number in descriptors().items() if not kind.startswith(SHARED)}
        return cls(len(children()), kinds, threads())


def misplaced(loop: OmniExecutor) -> list[str]:
    """What is shared with processes and belongs to nobody, or to one that is gone; the pids that a status names and
    that are none of ours.
    """
    executors = [host.executor for stage in loop._stages.values() for host in stage.hosts]
    apart: list[Any] = [each for each in executors if not each.shares_memory]
    segments = loop._commons.segments
    mapped = [segment for each in apart for segment in each._connection._mapped.values()]
    lent = sum(each._connection.num_lent for each in apart)
    known = {number for number, _ in list(segments._known.items())}
    placed = {segment.number for segment in (*segments._free, *mapped)}
    num_shared = sum(number for kind, number in descriptors().items() if kind.startswith(SHARED))
    # each is mapped, which holds a descriptor of its own, and kept to be sent; of pulses only the first
    expected = 2 * len(known) + len(apart)
    found = [f"{lent} segments are lent though nothing is done"] if lent else []
    found += [f"segments {sorted(known - placed)} belong to nobody"] if known - placed else []
    found += [f"{num_shared} descriptors of shared memory, expected {expected}"] if num_shared != expected else []
    pids = {each.place()["pid"] for each in apart}
    missing = pids - children()
    found += [f"processes {sorted(missing)} are none of {os.getpid()}"] if missing else []
    return found
