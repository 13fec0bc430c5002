"""Weights that wait in the host's memory: every family gives the same bits, no block is computed with before its
weights are there, copies are begun a block ahead, and the plan counts what stays.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ace_step, dit, flux2, qwen_image
from support.language_models import CPU, TINY, save_random_model, write
from support.late_copies import LateCopies
from transformers import Qwen3Config, Qwen3ForCausalLM

from vllm_omni.engine.base import StageSpec
from vllm_omni.layers import linear
from vllm_omni.layers.blocks import lists_of, tensors_of
from vllm_omni.params import DiffusionParams
from vllm_omni.worker.ar.language_model import LanguageModelFolder

SIDES = {"height": 64, "width": 64}
MAKE: dict[str, Callable[[Path], Any]] = {
    "z_image": dit.random_pipeline,
    "flux2": flux2.random_pipeline,
    "qwen_image": qwen_image.random_pipeline,
}


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[LateCopies]:
    """Those of the models that are loaded with `offload`; what is not streamed is not packed either."""
    made: list[LateCopies] = []

    def make(device: torch.device) -> LateCopies:
        made.append(LateCopies(device))
        return made[-1]

    monkeypatch.setattr(StageSpec, "make_copies", lambda spec: make if spec.offloads else None)
    monkeypatch.setattr(linear, "find_packing", lambda weight: None)
    return made


def drawn(folder: Path, offload: bool, monkeypatch: pytest.MonkeyPatch, policy: str) -> dict[str, torch.Tensor]:
    """Pictures of requests that are at different steps, guided and not."""
    monkeypatch.setattr(StageSpec, "offloads", offload)
    stage = dit.engine(folder, policy=policy)
    plain = DiffusionParams(seed=3, num_inference_steps=3, guidance_scale=0.0, **SIDES)
    guided = DiffusionParams(seed=4, num_inference_steps=2, guidance_scale=4.0, **SIDES)
    stage.submit(flux2.task("plain", plain))
    stage.step()
    stage.submit(flux2.task("guided", guided, is_guided=True))
    return dit.pictures(dit.run(stage))


@pytest.mark.parametrize("policy", ["none", "first_block"])
@pytest.mark.parametrize("family", MAKE)
def test_pictures_are_the_same_to_the_last_bit(
    family: str, policy: str, tmp_path: Path, copies: list[LateCopies], monkeypatch: pytest.MonkeyPatch
) -> None:
    MAKE[family](tmp_path)
    kept = drawn(tmp_path, False, monkeypatch, policy)
    streamed = drawn(tmp_path, True, monkeypatch, policy)
    assert kept.keys() == streamed.keys() == {"plain", "guided"}
    assert all(torch.equal(kept[name], streamed[name]) for name in kept)
    (made,) = copies
    if policy == "none":  # the first step, and what encodes a request, learn what follows what
        assert sum(made.ahead) > 0.6 * len(made.ahead) and len(made.ahead) > 8


def test_audio_is_the_same_to_the_last_bit(
    tmp_path: Path, copies: list[LateCopies], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its texts are read by all blocks before the first step."""
    pipeline = ace_step.random_pipeline(tmp_path)
    case = ace_step.Case("bells", duration_s=2.0)
    found = []
    for offload in (False, True):
        monkeypatch.setattr(StageSpec, "offloads", offload)
        stage = ace_step.engine(tmp_path)
        stage.submit(case.task(pipeline))
        found.append(ace_step.sounds(ace_step.run(stage)))
    assert found[0].keys() == found[1].keys() and copies
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> LanguageModelFolder:
    config = Qwen3Config(**TINY)
    return LanguageModelFolder.open(save_random_model(Qwen3ForCausalLM, config, tmp_path_factory.mktemp("words")))


@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_words_and_hidden_states_are_the_same_to_the_last_bit(
    quantization: str | None, words: LanguageModelFolder, copies: list[LateCopies]
) -> None:
    models = [words.load(CPU, torch.float32, quantization, make) for make in (None, LateCopies)]
    kept, streamed = (write(model, [[5, 6, 7], [9] * 11], 6, tapped_layers=[0, 2, 3]) for model in models)
    for ours, theirs in zip(streamed, kept, strict=True):
        assert ours.token_ids == theirs.token_ids and ours.states is not None and theirs.states is not None
        assert torch.equal(torch.stack(ours.logits), torch.stack(theirs.logits))
        assert torch.equal(ours.states, theirs.states)


@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_the_plan_counts_what_waits_and_what_stays(words: LanguageModelFolder, quantization: str | None) -> None:
    loaded: Any = words.load(CPU, torch.float32, quantization, LateCopies)
    planned = words.streamed_bytes(torch.float32, quantization)
    (layers,) = lists_of(loaded)
    assert layers.stream is not None
    sizes = [sum(tensor.nbytes for tensor in tensors_of(block)) for block in layers]
    assert sum(sizes) <= planned.waiting <= sum(sizes) + 256 * sum(len(tensors_of(block)) for block in layers)
    assert planned.slots == 2 * planned.waiting // len(layers)
