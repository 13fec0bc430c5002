"""What this process holds of the system, to be compared before and after: children, descriptors, threads, memory that
it shares with others.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from pathlib import Path


def children(pid: int | str = "self") -> set[int]:
    """Of a process, zombies included."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return {int(child) for task in tasks for child in task.read_text().split()}


def descendants(pid: int) -> set[int]:
    """Of a process, at any depth; zombies left out."""
    found: set[int] = set()
    for child in children(pid):
        if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            found |= {child, *descendants(child)}
    return found


def descriptors(pid: int | str = "self") -> Counter[str]:
    """How many a process has of each kind: pipe, socket, memory that is shared, ..."""
    kinds: Counter[str] = Counter()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            kinds[os.readlink(link).split(":")[0].split(" ")[0]] += 1  # noqa: PTH115
        except FileNotFoundError:  # that of the look itself
            continue
    return kinds


def resident_bytes(pid: int | str = "self") -> int:
    """Memory that a process has and shares with no file."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def threads() -> list[str]:
    """Names, sorted."""
    return sorted(thread.name for thread in threading.enumerate())
