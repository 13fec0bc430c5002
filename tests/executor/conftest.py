"""A stage that runs out of memory has everything looked through; what tests import is kept from that again."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def kept_from_the_collector() -> Iterator[None]:
    yield
    if gc.get_freeze_count() == 0:
        gc.collect()
        gc.freeze()
