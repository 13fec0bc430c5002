"""What this process holds of the system, to be compared before and after: children, descriptors, threads, memory that
it shares with others.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from pathlib import Path

from vllm_omni.utils.children import fork_client


def children(pid: int | str = "self") -> set[int]:
    """Of a process, zombies included; in place of a fork server, which lives on for a while, those that it forked."""
    found: set[int] = set()
    for child in own_children(pid):
        found |= own_children(child) if is_fork_server(child) else {child}
    return found


def is_fork_server(pid: int) -> bool:
    """What it has forked has its command line, and another parent than that names; one that was forked has a name."""
    try:
        if Path(f"/proc/{pid}/comm").read_text().strip() == forked_server_name(pid):
            return True
        command = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
    except OSError:
        return False
    at = command.index(fork_client.MODULE) if fork_client.MODULE in command else None
    return at is not None and command[at + 2] == parent


def forked_server_name(pid: int) -> str:
    """Of a fork server that was not started afresh: its children have it too, but not its process id."""
    return f"forks-{pid}"


def own_children(pid: int | str) -> set[int]:
    """Those that it has started itself, fork servers and zombies among them."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return {int(child) for task in tasks for child in task.read_text().split()}


def descendants(pid: int) -> set[int]:
    """Of a process, at any depth; zombies left out, and fork servers, which live on for a while."""
    found: set[int] = set()
    for child in own_children(pid):
        if is_fork_server(child):
            found |= descendants(child)
        elif Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
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
