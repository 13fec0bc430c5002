"""The native Z-Image transformer and stage against diffusers, on random small weights in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ZImageTransformer2DModel
from support.dit import BOTH, engine, pictures, random_pipeline, random_transformer, run, states, task

from vllm_omni.errors import CheckpointError, ConfigError
from vllm_omni.layers.weights import load_weights, plan_loading
from vllm_omni.models.z_image.config import ZImageConfig
from vllm_omni.models.z_image.packing import padded
from vllm_omni.models.z_image.transformer import ZImageTransformer
from vllm_omni.params import DiffusionParams

PUBLISHED = dict(
    in_channels=16,
    dim=3840,
    n_layers=30,
    n_refiner_layers=2,
    n_heads=30,
    n_kv_heads=30,
    norm_eps=1e-5,
    qk_norm=True,
    cap_feat_dim=2560,
    rope_theta=256.0,
    t_scale=1000.0,
    axes_dims=[32, 48, 48],
    axes_lens=[1536, 512, 512],
)


def encoded(model: ZImageTransformer, features: torch.Tensor) -> torch.Tensor:
    length = len(features)
    wide = torch.nn.functional.pad(features, (0, 0, 0, padded(length) - length))
    return model.encode_text(wide[None], (torch.arange(len(wide)) >= length)[None])[0]


@pytest.mark.parametrize("n_refiner_layers, n_heads, qk_norm", [(1, 2, True), (2, 1, True), (1, 2, False)])
@torch.no_grad()
def test_velocities_of_a_mixed_batch_equal_the_reference(
    tmp_path: Path, n_refiner_layers: int, n_heads: int, qk_norm: bool
) -> None:
    axes = [8, 12, 12] if n_heads == 2 else [16, 24, 24]
    sizes = dict(n_refiner_layers=n_refiner_layers, n_heads=n_heads, n_kv_heads=n_heads, axes_dims=axes)
    reference = random_transformer(qk_norm=qk_norm, **sizes)
    reference.save_pretrained(tmp_path)
    ours = ZImageTransformer(ZImageConfig.from_folder(tmp_path))
    load_weights(ours, tmp_path)
    latents = [torch.randn(16, h, w) for h, w in ((8, 8), (4, 12), (8, 8), (12, 4), (6, 6))]
    texts = [states(length, seed) for seed, length in enumerate((1, 32, 33, 7, 64))]
    timesteps = torch.tensor([0.0, 0.3, 0.5, 0.999, 1.0])
    expected = reference([x[:, None] for x in latents], timesteps, texts, return_dict=False)[0]
    got = ours(latents, timesteps, [encoded(ours, text) for text in texts])
    for a, b in zip(got, expected, strict=True):
        assert (a - b[:, 0]).abs().max() < 1e-5 * b.abs().max()


def test_pictures_of_one_batch_equal_the_reference_pipeline(tmp_path: Path) -> None:
    """Sizes, step counts, guidance 0, 1 and 4, normalisation and truncation, short and long texts, all in ONE batch."""
    pipeline, stage = random_pipeline(tmp_path), engine(tmp_path)
    cases = [
        (64, 64, 0.0, 4, 5, {}),
        (32, 96, 1.0, 6, 33, {}),
        (64, 64, 4.0, 3, 7, {"cfg_normalization": 1.0}),
        (96, 32, 4.0, 5, 40, {"cfg_truncation": 0.5}),
        (48, 48, 2.0, 1, 100, {}),
        (64, 64, 4.0, 8, 1, {"cfg_normalization": True}),
    ]
    expected = {}
    for seed, (height, width, guidance, steps, length, extra) in enumerate(cases):
        params = DiffusionParams(
            height=height, width=width, guidance_scale=guidance, num_inference_steps=steps, seed=seed, extra=extra
        )
        stage.spec.check(task(str(seed), params).request, params, BOTH)
        stage.submit(task(str(seed), params, length, seed))
        picture = pipeline(
            prompt_embeds=[states(length, seed)],
            negative_prompt_embeds=[states(9, 1000)],
            height=height,
            width=width,
            guidance_scale=guidance,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
            **extra,
        ).images[0]
        expected[str(seed)] = (picture * 255).round().astype(int)
    got = pictures(run(stage))
    for key, picture in expected.items():
        assert np.abs(got[key][0].numpy().astype(int) - picture).max() <= 2, key
        assert picture.std() > 10, "a flat picture would prove nothing"


def test_published_names_and_shapes_load_with_nothing_missing_and_nothing_left_over() -> None:
    with torch.device("meta"):
        reference = ZImageTransformer2DModel(**PUBLISHED)
        ours = ZImageTransformer(ZImageConfig.from_dict(PUBLISHED))
    shapes = {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    assert len(plan_loading(ours, shapes, "published")) == len(shapes)


def test_missing_left_over_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    reference = random_transformer()
    reference.save_pretrained(tmp_path)
    ours = ZImageTransformer(ZImageConfig.from_folder(tmp_path))
    shapes = {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    name = "layers.1.attention.to_k.weight"
    with pytest.raises(CheckpointError, match=r"layers\.1\.attention\.qkv\.weight"):
        plan_loading(ours, {k: v for k, v in shapes.items() if k != name}, "x")
    with pytest.raises(CheckpointError, match=r"to_k.*\[1, 2\].*expected \[64, 64\]"):
        plan_loading(ours, {**shapes, name: (1, 2)}, "x")
    with pytest.raises(CheckpointError, match=r"unexpected tensor 'layers\.9\.x'"):
        plan_loading(ours, {**shapes, "layers.9.x": (1,)}, "x")


@pytest.mark.parametrize(
    "change, key",
    [
        ({"siglip_feat_dim": 8}, "siglip_feat_dim"),
        ({"all_patch_size": [4]}, "all_patch_size"),
        ({"n_kv_heads": 15}, "n_kv_heads"),
        ({"axes_dims": [32, 48, 40]}, "axes_dims"),
    ],
)
def test_what_the_model_does_not_compute_is_refused(change: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        ZImageConfig.from_dict({**PUBLISHED, **change})
