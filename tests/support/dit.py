"""Small random Z-Image folders in the published format, and engines over them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

from vllm_omni.config.schema import DiTCacheConfig, LimitsConfig, OmniConfig, StageConfig
from vllm_omni.core.diffusion.dit_cache_manager import DiTCacheManager
from vllm_omni.engine.base import Activity, EngineContext, ReadPorts
from vllm_omni.engine.diffusion.engine import DiffusionEngine
from vllm_omni.engine.diffusion.options import DiTOptions
from vllm_omni.engine.diffusion.spec import DiffusionSpec
from vllm_omni.messages import StageDone, StageEvent, StageTask
from vllm_omni.params import DiffusionParams
from vllm_omni.request import OmniRequest
from vllm_omni.utils.files import ModelFolders
from vllm_omni.worker.background import Background
from vllm_omni.worker.diffusion.encoded_images import EncodedImages
from vllm_omni.worker.model_pool import ModelPool

TEXT_WIDTH = 48


def random_transformer(seed: int = 0, **overrides: Any) -> ZImageTransformer2DModel:
    torch.manual_seed(seed)
    config: dict[str, Any] = dict(
        in_channels=16,
        dim=64,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT_WIDTH,
        axes_dims=[8, 12, 12],
        axes_lens=[256, 64, 64],
    )
    model = ZImageTransformer2DModel(**{**config, **overrides}).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    return model


def random_vae(widths: tuple[int, ...] = (8, 8, 16, 16)) -> AutoencoderKL:
    torch.manual_seed(1)
    return (
        AutoencoderKL(
            block_out_channels=widths,
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=0.36,
            shift_factor=0.11,
            sample_size=64,
        )
        .eval()
        .requires_grad_(False)
    )


def random_pipeline(folder: Path, **transformer: Any) -> ZImagePipeline:
    """A pipeline without a text encoder (states are given), saved into `folder`."""
    parts = (FlowMatchEulerDiscreteScheduler(shift=3.0), random_vae(), None, None)
    pipeline = ZImagePipeline(*parts, random_transformer(**transformer))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline


BOTH = ReadPorts(frozenset({"image", "latents"}))


def cache_keys(policy: str = "none", threshold: float | None = None, **keys: Any) -> dict[str, Any]:
    """What stands under `cache` in a YAML; keys that are None are left out."""
    given = {"policy": policy, "threshold": threshold, **keys}
    return {key: value for key, value in given.items() if value is not None}


def spec(folder: Path, *, cache: Mapping[str, Any] | None = None, **options: Any) -> DiffusionSpec:
    stage = StageConfig(
        name="image",
        kind="dit",
        model=str(folder),
        inputs={"prompt_embeds": "text.hidden_states", "negative_prompt_embeds": "negative.hidden_states"},
        options=DiTOptions(cache=cache or {}, **options),
    )
    return DiffusionSpec(stage, OmniConfig(), ModelFolders())


def engine(
    folder: Path,
    *,
    policy: str = "none",
    threshold: float | None = None,
    cache: Mapping[str, Any] | None = None,
    wanted: frozenset[str] = BOTH.whole,
    cache_mb: float = 64.0,
    **options: Any,
) -> DiffusionEngine:
    """cache: the whole group of keys, where policy and threshold do not say it."""
    reads, dit_cache = ReadPorts(wanted), DiTCacheConfig(max_memory_mb=cache_mb)
    context = EngineContext(torch.device("cpu"), torch.float32, ModelPool(), Background(), reads, dit_cache=dit_cache)
    return spec(folder, cache=cache or cache_keys(policy, threshold), **options).load(context)


def encoded_images(max_bytes: int = 2**20) -> EncodedImages:
    """What `prepare` of a model is given."""
    return EncodedImages(DiTCacheManager(max_bytes=max_bytes), LimitsConfig())


def states(length: int, seed: int) -> torch.Tensor:
    """[length, TEXT_WIDTH]"""
    return torch.randn(length, TEXT_WIDTH, generator=torch.Generator().manual_seed(seed))


def task(request_id: str, params: DiffusionParams, length: int = 7, seed: int = 0) -> StageTask:
    inputs = {"prompt_embeds": states(length, seed)}
    if params.guidance_scale is None or params.guidance_scale > 0:
        inputs["negative_prompt_embeds"] = states(9, 1000)
    return StageTask(OmniRequest(prompt="words", request_id=request_id), "image", params, inputs)


def run(stage: DiffusionEngine) -> dict[str, StageEvent]:
    """Steps until there is no work; the last event of each request. Integrity is checked after every step."""
    last: dict[str, StageEvent] = {}
    while stage.activity() is Activity.BUSY:
        for event in stage.step():
            assert not isinstance(last.get(event.request_id), StageDone), "an event after the final one"
            last[event.request_id] = event
        stage.check_integrity()
    return last


def pictures(events: dict[str, StageEvent]) -> dict[str, torch.Tensor]:
    """[n, H, W, 3] uint8 by request."""
    done = {key: event for key, event in events.items() if isinstance(event, StageDone)}
    assert done.keys() == events.keys(), events
    return {key: event.payload.tensors["image"] for key, event in done.items()}
