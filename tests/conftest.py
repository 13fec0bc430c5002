"""What all tests need: random-operation tests do not fail because the machine is busy (no deadlines, no word about
slow data); an interrupt interrupts, also where a shell started the tests in the background, processes that share the
tests out do not wait for each other's threads, garbage is looked for among what tests made and not among what they
imported, and Triton's kernels run in its interpreter where there is no GPU.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported, and for what a test starts
    # One thread: of several each waits for the slowest, which waits for a core that another process has. Where there
    # are more, as in tests of layers, they sleep while they have nothing to do: those that spin would take the cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cuda", help="where tests marked cuda run; cpu: a look at whether they would")
    parser.addoption("--plain", action="store_true", help="compute as where the CPU kernels are not compiled")
    parser.addoption("--min-coverage", type=float, metavar="PERCENT", help="of the package's lines that tests run")


def pytest_configure(config: pytest.Config) -> None:
    if not has_cuda():
        os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported
    if config.getoption("--min-coverage") is not None:  # before the package is imported
        from support.line_coverage import LineCoverage

        config.pluginmanager.register(LineCoverage(config.getoption("--min-coverage")))
    if config.getoption("--plain"):  # before anybody asks, in this process: what a test starts computes as it would
        from vllm_omni.layers.native import library

        pytest.MonkeyPatch().setattr(library, "built_variants", dict)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") == "cuda" and not has_cuda():
        for item in items:
            if item.get_closest_marker("cuda") is not None:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """What the modules of all tests import stays to the end: no search for garbage need look through it."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def gpu(request: pytest.FixtureRequest) -> torch.device:
    """Where tests marked cuda run."""
    import torch

    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True, scope="session")
def interrupts() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
