"""Servers from nothing to ready: the wall time, and what all their processes take of the processors and of memory."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measure import Options, Table, with_spread
from tests.support.belongings import own_children
from tests.support.server import ServerProcess

CONFIG = "tiny_omni"
STAGES = ("thinker", "scene_text", "image", "sound_prompt", "sound_text", "lyrics", "sound")
WAYS: dict[str, Sequence[str]] = {
    "stages in the server's process": ["--in-process"],
    "stages in one process beside it, as by default": [],
    f"{len(STAGES)} stages, a process each": [
        word for stage in STAGES for word in ("--set", f"{stage}.executor=process")
    ],
}


@dataclass(slots=True)
class ServerStarts:
    """What was found of one way to place the stages, a figure for each start."""

    seconds: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)  # of user and system, until ready
    memory_mb: list[float] = field(default_factory=list)  # pages that processes share are counted once


def server_starts(options: Options) -> dict[str, ServerStarts]:
    """Way -> its figures; one start of each after the other, the first round uncounted."""
    found = {way: ServerStarts() for way in WAYS}
    for index in range(-1, 1 if options.is_quick else options.repeats):
        for way, flags in WAYS.items():
            started = time.perf_counter()
            with ServerProcess([CONFIG], flags, fresh=True) as server:
                spent = time.perf_counter() - started
                processes = family(server.pid)
                if index >= 0:
                    found[way].seconds.append(spent)
                    found[way].cpu_s.append(sum(map(cpu_seconds, processes)))
                    found[way].memory_mb.append(sum(map(share_of_memory_mb, processes)))
    return found


def family(pid: int) -> list[int]:
    """A process and all that it, and those, have started; on Linux."""
    return [pid, *(each for child in own_children(pid) for each in family(child))]


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def share_of_memory_mb(pid: int) -> float:
    """MiB in RAM, of pages that processes share its share of them."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 2**10


def server_table(found: dict[str, ServerStarts]) -> Table:
    return Table(
        f"`vllm-omni serve --config {CONFIG}`, until it is ready",
        ("where the stages are", "wall time, s", "CPU time, s", "memory, MiB"),
        [
            [way, with_spread(starts.seconds), with_spread(starts.cpu_s), with_spread(starts.memory_mb, 0)]
            for way, starts in found.items()
        ],
    )


def server_figures(found: dict[str, ServerStarts]) -> dict[str, Any]:
    return {
        way: {"seconds": starts.seconds, "cpu_s": starts.cpu_s, "memory_mb": starts.memory_mb}
        for way, starts in found.items()
    }
