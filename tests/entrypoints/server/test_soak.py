"""Clients that die at random leave nothing behind, and a request that fails takes no other with it."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest
from support.server import ServerProcess

from tools.soak_server import ENVIRONMENT, SMALL_POOLS, Level, Soak

SECONDS, WARMUP_S = 6.0, 3.0


@pytest.mark.skipif(sys.platform != "linux", reason="open files are counted in /proc")
def test_killed_clients_leave_no_block_no_task_no_socket_no_file_and_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**ENVIRONMENT, "TMPDIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("tools.soak_server.FAILS_EVERY", 20)  # so short a time has no hundred requests
    with ServerProcess(["tiny_omni"], SMALL_POOLS) as server:
        findings = asyncio.run(Soak(server.address, server.pid, tmp_path).run(SECONDS, WARMUP_S))
        assert server.get("/ready").status_code == 200
    assert findings.complaints == []
    assert findings.after is not None and findings.after.held_blocks == 0
    assert findings.ends["killed"] > 5 and findings.ends["answered"] > 2 and findings.ends["failed as meant"] > 0


def test_whatever_is_left_behind_is_told() -> None:
    before = Level(held_blocks=0, tasks=3, descriptors=7, segments=1, temporary_files=0, memory_mb=700)
    assert before.leaks(before) == []
    after = Level(held_blocks=2, tasks=4, descriptors=8, segments=40, temporary_files=1, memory_mb=900)
    assert [leak.split(":")[0] for leak in after.leaks(before)] == [
        *("held_blocks", "tasks", "descriptors", "segments", "temporary_files", "memory_mb")
    ]
