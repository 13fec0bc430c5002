"""Qwen2.5-VL with pictures and videos against transformers' whole model: tokens and hidden states, alone and in a
crowd, in prefill chunks, in pools that are too small, and from the prefix cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from support.ar import assert_clean, done, load, make_spec, make_stage, make_task, run, states_of, tokens_of
from support.media import picture
from support.seeing import Reference, save_tiny_vl, user
from torch import Tensor

from vllm_omni.engine.ar.engine import AREngine
from vllm_omni.params import SamplingParams
from vllm_omni.worker.ar.vision_tower import VisionTower
from vllm_omni.worker.background import Background, BackgroundJob, Stop
from vllm_omni.worker.model_pool import ModelPool

T = TypeVar("T")
NUM_TOKENS = 12
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
PORTS = {"h": {"layers": [1, 2, 3], "tokens": "prompt"}}
FRAMES = np.stack([picture(32, 48, seed) for seed in range(6)])

CASES = {
    "words": user("Hello, who are you?"),
    "one picture": user("See ", picture(24, 40), " what?"),
    "two pictures": user(picture(64, 16, 1), picture(32, 48, 2), "Compare."),
    "video": user("Watch ", FRAMES, " now."),
    "both": user(FRAMES[:2], "and", picture(8, 64, 3), "?"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_vl(tmp_path_factory.mktemp("vl") / "model")


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, tuple[list[int], Tensor]]:
    reference = Reference(folder)
    return {name: reference.write(messages, NUM_TOKENS) for name, messages in CASES.items()}


@pytest.fixture(scope="module")
def pool() -> ModelPool:
    return ModelPool()


class AtOnce(Background):
    """Reads media when it is asked to, so that sequences begin in the order of their requests."""

    def begin(self, function: Callable[[Stop], T]) -> BackgroundJob[T]:
        job = super().begin(function)
        while not job.is_done:
            time.sleep(0.001)
        return job


def engine_of(folder: Path, pool: ModelPool, **options: Any) -> AREngine:
    keys = {"chat_template": True, "outputs": PORTS, "max_model_len": 600, **options}
    return load(make_spec(make_stage(folder, **keys)), whole=["h"], models=pool, background=AtOnce())


def test_the_cases_are_told_apart(expected: Any) -> None:
    assert len({tuple(tokens) for tokens, _ in expected.values()}) == len(CASES)


@pytest.mark.parametrize(
    ("options", "preempts"),
    [
        ({}, False),
        ({"max_num_batched_tokens": 9}, False),
        ({"block_size": 7, "max_num_seqs": 2}, False),
        ({"num_blocks": 41, "max_model_len": 130, "prefix_caching": False}, True),
    ],
)
def test_tokens_and_states_equal_the_reference_in_any_crowd(
    options: dict[str, Any], preempts: bool, folder: Path, pool: ModelPool, expected: Any
) -> None:
    engine = engine_of(folder, pool, **options)
    names = [name for name in CASES if not preempts or "picture" in name or name == "words"]
    for order in (names, names[::-1]):
        found = run(engine, *(make_task(CASES[name], GREEDY, name) for name in order))
        for name in order:
            tokens, states = expected[name]
            assert tokens_of(found[name]) == tokens, name
            torch.testing.assert_close(states_of(found[name]), states, rtol=1e-4, atol=1e-4)
    assert_clean(engine)
    assert (engine.get_stats()["num_preemptions"] > 0) is preempts


@pytest.mark.parametrize("name", CASES)
def test_alone_is_as_in_a_crowd(name: str, folder: Path, pool: ModelPool, expected: Any) -> None:
    engine = engine_of(folder, pool)
    found = run(engine, make_task(CASES[name], GREEDY))["r"]
    assert tokens_of(found) == expected[name][0]


def test_a_prefix_hit_needs_no_tower_and_another_picture_is_none(
    folder: Path, pool: ModelPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    plain = VisionTower.encode

    def counting(self: VisionTower, item: Any) -> Tensor:
        encoded.append(item.kind)
        return plain(self, item)

    monkeypatch.setattr(VisionTower, "encode", counting)
    engine = engine_of(folder, pool, max_num_batched_tokens=16)
    events = [
        done(run(engine, make_task(user(picture(24, 40, seed), "What is in it?"), GREEDY))["r"]) for seed in (0, 1, 0)
    ]
    hits = [event.metrics["cache_hits"] for event in events]
    assert encoded == ["image", "image"] and hits[0] == 0 and 0 < hits[1] < 50 < hits[2]
    states = [states_of(event)[hits[1] :] for event in events]
    assert torch.equal(states[0], states[2]) and not torch.isclose(states[0], states[1]).any(dim=1).all()
