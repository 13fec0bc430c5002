"""What all tests need: random-operation tests do not fail because the machine is busy (no deadlines, no word about
slow data), an interrupt interrupts, also where a shell started the tests in the background, and processes that share
the tests out do not wait for each other's threads.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported, and for what a test starts
    # Two threads on any machine, since with several sums round otherwise. They sleep while they have nothing to do:
    # those that spin would take the cores from the other processes.
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


@pytest.fixture(autouse=True, scope="session")
def interrupts() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--plain", action="store_true", help="compute as where the CPU kernels are not compiled")


@pytest.fixture(autouse=True, scope="session")
def plain(request: pytest.FixtureRequest) -> Iterator[None]:
    """In this process; those that a test starts compute as they would."""
    with pytest.MonkeyPatch.context() as patched:
        if request.config.getoption("--plain"):
            from vllm_omni.layers.native import library

            patched.setattr(library, "built_variants", dict)
        yield
