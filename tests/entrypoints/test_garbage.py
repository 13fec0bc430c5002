"""While models load the collector looks seldom, and then again as the process wants it that loads them."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from vllm_omni.entrypoints.garbage import WHILE_LOADING, SeldomLooks
from vllm_omni.entrypoints.loading import load_executor, open_pipeline


@pytest.fixture(autouse=True)
def usual() -> Iterator[None]:
    """As it is for other tests."""
    before = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    yield
    gc.set_threshold(*before)


def test_it_is_seldom_until_the_last_has_left() -> None:
    looks = SeldomLooks()
    with looks:
        with looks:
            assert gc.get_threshold() == (WHILE_LOADING, 10, 10)
        assert gc.get_threshold() == (WHILE_LOADING, 10, 10)
    assert gc.get_threshold() == (700, 10, 10)


@pytest.mark.parametrize("never_or_rarer", [0, 2 * WHILE_LOADING])
def test_who_looks_never_or_more_seldom_goes_on_so(never_or_rarer: int) -> None:
    gc.set_threshold(never_or_rarer, 5, 5)
    with SeldomLooks():
        assert gc.get_threshold() == (never_or_rarer, 5, 5)
    assert gc.get_threshold() == (never_or_rarer, 5, 5)


def test_models_load_so_and_also_those_that_cannot() -> None:
    seen: list[int] = []

    def note(*_: object) -> None:
        seen.append(gc.get_threshold()[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_executor(open_pipeline("tiny_talker"), note)
    assert seen == [WHILE_LOADING] and gc.get_threshold() == (700, 10, 10)
