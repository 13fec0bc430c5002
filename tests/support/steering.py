"""A random model made to write given tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.support.ar import is_busy
from vllm_omni.engine.ar.engine import AREngine


def steer(engine: AREngine, token_ids: list[int], after_step: Callable[[], object] = lambda: None) -> list[Any]:
    """Steps to the end while every next token is forced by a bias, so that a random model writes given words."""
    events: list[Any] = []
    (job,) = engine._jobs.values()
    (sample,) = job.samples.values()  # type: ignore[attr-defined]
    generation = sample.generation
    generation.row._is_never_plain, generation.row.is_plain = True, False  # it has a bias from now on
    while is_busy(engine):
        if generation.num_written < len(token_ids):
            generation.row._bias = {token_ids[generation.num_written]: 1e6}
        events += engine.step()
        after_step()
    return events
