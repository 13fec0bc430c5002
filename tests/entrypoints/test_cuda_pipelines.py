"""On a GPU the shipped pipelines give in float32 what they give on a CPU: the words, nearly the pictures and audio."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from vllm_omni import DiffusionParams, Omni, OmniOutput, SamplingParams

pytestmark = pytest.mark.cuda
SEED = 11


def on_both(gpu: torch.device, prompts: list[str], params: Any, **omni: Any) -> list[list[OmniOutput]]:
    """The outputs of the GPU and of the CPU."""
    found = []
    for device in (str(gpu), "cpu"):
        with Omni(**omni, device=device, dtype="float32", progress=False) as made:
            found.append(made.generate(prompts, params))
    assert all(output.error is None for outputs in found for output in outputs), found
    return found


def test_words(gpu: torch.device) -> None:
    prompts = ["could you draw me a golden hoop", "a red circle left of a blue square", "three green squares"]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    for ours, theirs in zip(*on_both(gpu, prompts, params, model="asset://tiny-image/text_encoder"), strict=True):
        assert ours.token_ids == theirs.token_ids and len(ours.token_ids or ()) == 24


def test_pictures(gpu: torch.device) -> None:
    prompts = ["a red circle left of a blue square", "a yellow ring"]
    params = [DiffusionParams(seed=SEED), DiffusionParams(seed=SEED, height=96, width=128)]
    for ours, theirs in zip(*on_both(gpu, prompts, params, config="tiny_image"), strict=True):
        difference = np.asarray(ours.images[0]).astype(int) - np.asarray(theirs.images[0]).astype(int)
        assert np.abs(difference).max() <= 4


def test_audio(gpu: torch.device) -> None:
    params = DiffusionParams(seed=SEED, duration_s=2.0)
    for ours, theirs in zip(*on_both(gpu, ["C4 then E4, square"], params, config="tiny_audio"), strict=True):
        mine, other = (np.asarray(output.audios[0].samples) for output in (ours, theirs))
        assert mine.shape == other.shape
        assert np.abs(mine - other).max() <= 0.01 * np.abs(other).max()
