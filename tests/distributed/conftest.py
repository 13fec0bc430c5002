"""What several files of these tests need of their surroundings."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ray_settings() -> Iterator[None]:
    """A token of its own, so that Ray writes none into the home folder; nothing is told to its makers. They are read
    when Ray is imported, once.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patched.setenv("RAY_AUTH_MODE", "token")
        patched.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patched.delenv("RAY_ADDRESS", raising=False)
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Here as in the processes, which share the threads of this one out: with another number sums round otherwise."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
