"""What all tests need: random-operation tests do not fail because the machine is busy (no deadlines, no word about
slow data), an interrupt interrupts, also where a shell started the tests in the background, and of several processes
that share the tests each computes with one thread.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported, and for what a test starts
    os.environ["OMP_NUM_THREADS"] = "1"

settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


@pytest.fixture(autouse=True, scope="session")
def interrupts() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
