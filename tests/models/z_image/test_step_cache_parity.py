"""Step caches on one Z-Image picture against diffusers' own hooks: the same skips, the same picture, in float32.

diffusers has no public way to use its hooks with this transformer, whose blocks call their argument `x`: where its
helpers have moved, nothing can be compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline
from diffusers.hooks import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    TaylorSeerCacheConfig,
    apply_first_block_cache,
    apply_mag_cache,
    apply_taylorseer_cache,
)
from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock
from support.dit import engine, random_pipeline, run, spec, states, task
from torch import nn

from vllm_omni.core.diffusion.caches.recording import Recording
from vllm_omni.entrypoints.calibration.fit import fit
from vllm_omni.messages import StageDone
from vllm_omni.params import DiffusionParams

SETTINGS: dict[str, Any] = dict(height=64, width=64, guidance_scale=0.0, num_inference_steps=10)


class NamedBlock(ZImageTransformerBlock):
    """The reference's block with the argument name that diffusers' cache hooks look for (it calls it `x`)."""

    num_runs = 0

    def forward(self, hidden_states: torch.Tensor, *rest: object) -> torch.Tensor:
        NamedBlock.num_runs += 1
        return super().forward(hidden_states, *rest)


class Rest(nn.Module):
    """All blocks as one: what they add, which is what is extrapolated."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, x: torch.Tensor, *rest: object) -> torch.Tensor:
        y = x
        for block in self.blocks:
            y = block(y, *rest)
        return y - x


class Whole(nn.Module):
    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.stack = Rest(blocks)

    def forward(self, x: torch.Tensor, *rest: object) -> torch.Tensor:
        return x + self.stack(x, *rest)


def reference_pipeline(folder: Path) -> ZImagePipeline:
    helpers = pytest.importorskip("diffusers.hooks._helpers")
    pipeline = random_pipeline(folder)
    metadata = helpers.TransformerBlockMetadata(return_hidden_states_index=0)
    helpers.TransformerBlockRegistry.register(NamedBlock, metadata)
    for block in pipeline.transformer.layers:
        block.__class__ = NamedBlock
    return pipeline


def draw(pipeline: ZImagePipeline, seed: int) -> tuple[np.ndarray, int]:
    """(the reference's picture 0 to 255, how many blocks it ran)"""
    hooks = pytest.importorskip("diffusers.hooks.hooks")
    hooks._set_cache_context(pipeline.transformer, hooks.CacheContext("one picture"))
    NamedBlock.num_runs = 0
    embeds = {"prompt_embeds": [states(7, seed)], "negative_prompt_embeds": []}
    generator = torch.Generator().manual_seed(seed)
    picture = pipeline(**embeds, **SETTINGS, generator=generator, output_type="np").images[0]
    return (picture * 255).round().astype(int), NamedBlock.num_runs


def compare(
    tmp_path: Path,
    apply: Callable[[nn.Module], None],
    cache: dict[str, Any],
    num_lead_blocks: int,
    prepare: Callable[[ZImagePipeline], None] = lambda pipeline: None,
) -> int:
    """The number of replayed steps, the same on both sides, of a picture that is the same on both sides."""
    pipeline = reference_pipeline(tmp_path)
    num_blocks, num_steps = len(pipeline.transformer.layers), SETTINGS["num_inference_steps"]
    prepare(pipeline)
    apply(pipeline.transformer)
    expected, num_runs = draw(pipeline, seed=0)
    stage = engine(tmp_path, cache=cache)
    stage.submit(task("x", DiffusionParams(seed=0, **SETTINGS), 7, 0))
    event = run(stage)["x"]
    assert isinstance(event, StageDone)
    num_replayed = event.metrics["cache_hits"]
    assert num_runs == num_steps * num_blocks - num_replayed * (num_blocks - num_lead_blocks)
    got = event.payload.tensors["image"][0].numpy().astype(int)
    assert np.abs(got - expected).max() <= 2
    assert expected.std() > 10, "a flat picture would prove nothing"
    return int(num_replayed)


@pytest.mark.parametrize("threshold, some", [(0.5, False), (1.1, True), (1.2, True), (1.3, True), (5.0, True)])
def test_first_block(tmp_path: Path, threshold: float, some: bool) -> None:
    """From no step that is replayed to all but the first."""

    def apply(transformer: nn.Module) -> None:
        apply_first_block_cache(transformer, FirstBlockCacheConfig(threshold=threshold))

    cache = {"policy": "first_block", "threshold": threshold}
    assert (compare(tmp_path, apply, cache, num_lead_blocks=1) > 0) == some


@pytest.mark.parametrize("interval, warmup, order", [(5, 3, 1), (2, 1, 1), (3, 2, 0)])
def test_taylorseer(tmp_path: Path, interval: int, warmup: int, order: int) -> None:
    """Their hook on what all blocks add: they hook modules, and none of this model's is that."""

    def join(pipeline: ZImagePipeline) -> None:
        pipeline.transformer.layers = nn.ModuleList([Whole(pipeline.transformer.layers)])

    def apply(transformer: nn.Module) -> None:
        config = TaylorSeerCacheConfig(
            cache_interval=interval,
            disable_cache_before_step=warmup,
            max_order=order,
            taylor_factors_dtype=torch.float32,
            cache_identifiers=[r"layers\.0\.stack"],
        )
        apply_taylorseer_cache(transformer, config)

    cache = {"policy": "taylorseer", "interval": interval, "warmup_steps": warmup, "order": order}
    assert compare(tmp_path, apply, cache, num_lead_blocks=0, prepare=join) > 2


RATIOS = [1.0, 1.05, 0.97, 1.02, 0.96, 1.01, 0.93, 0.99, 1.04, 0.98]


@pytest.mark.parametrize(
    "ratios, threshold, max_skips, first",
    [(RATIOS, 0.06, 3, 0.2), (RATIOS, 0.2, 2, 0.0), (RATIOS[:7], 0.1, 9, 0.3), ([*RATIOS, *RATIOS], 0.025, 3, 0.2)],
)
def test_magcache(tmp_path: Path, ratios: list[float], threshold: float, max_skips: int, first: float) -> None:
    """Also with the ratios of fewer and of more steps."""

    def apply(transformer: nn.Module) -> None:
        config = MagCacheConfig(
            threshold=threshold,
            max_skip_steps=max_skips,
            retention_ratio=first,
            num_inference_steps=SETTINGS["num_inference_steps"],
            mag_ratios=ratios,
        )
        apply_mag_cache(transformer, config)

    cache = {
        "policy": "magcache",
        "threshold": threshold,
        "max_skips": max_skips,
        "warmup_fraction": first,
        "ratios": ratios,
        "fitted_on": saved_fingerprint(tmp_path),
    }
    assert 0 < compare(tmp_path, apply, cache, num_lead_blocks=0) < SETTINGS["num_inference_steps"] - 1


def saved_fingerprint(folder: Path) -> str:
    """Of the random weights, which are always the same."""
    random_pipeline(folder)
    return spec(folder).model.fingerprint()


def test_the_calibrated_ratios_are_the_reference_s(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = reference_pipeline(tmp_path)
    num_steps = SETTINGS["num_inference_steps"]
    apply_mag_cache(pipeline.transformer, MagCacheConfig(num_inference_steps=num_steps, calibrate=True))
    draw(pipeline, seed=0)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[1.0, ")]
    stage = engine(tmp_path, cache={"policy": "recording"})
    stage.submit(task("x", DiffusionParams(seed=0, **SETTINGS), 7, 0))
    run(stage)
    assert isinstance(stage.spec.policy, Recording)
    found = fit("magcache", stage.spec.policy.records, num_steps, degree=4).keys["ratios"]
    assert found == pytest.approx(json.loads(printed[0]), rel=1e-4) and len(found) == num_steps
