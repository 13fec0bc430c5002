"""The native Qwen-Image transformer against diffusers', on random small weights in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from support.dit import states
from support.qwen_image import random_transformer

from vllm_omni.errors import CheckpointError, ConfigError
from vllm_omni.layers.weights import load_weights, plan_loading
from vllm_omni.models.qwen_image.config import QwenImageConfig
from vllm_omni.models.qwen_image.transformer import Context, QwenImageTransformer, grid_of
from vllm_omni.worker.diffusion.patches import patchified, unpatchified

# Latent height and width, sizes of references, text tokens, time.
ROWS = [
    ((8, 8), (), 5, 1.0),
    ((4, 12), ((6, 10),), 17, 0.37),
    ((8, 8), (), 5, 0.02),
    ((6, 6), ((8, 4), (4, 4), (10, 6)), 1, 0.5),
    ((4, 12), ((6, 10),), 17, 0.9),
    ((6, 6), ((4, 8), (4, 4)), 9, 0.25),
]


def loaded(folder: Path, **overrides: Any) -> tuple[QwenImageTransformer2DModel, QwenImageTransformer]:
    reference = random_transformer(**overrides)
    reference.save_pretrained(folder)
    ours = QwenImageTransformer(QwenImageConfig.from_folder(folder)).eval().requires_grad_(False)
    load_weights(ours, folder)
    return reference, ours


def packed(latents: torch.Tensor) -> torch.Tensor:
    return patchified(latents[None], channels_first=True)


@pytest.mark.parametrize("zero_cond_t", [False, True])
@torch.no_grad()
def test_velocities_of_a_mixed_batch_equal_the_reference(tmp_path: Path, zero_cond_t: bool) -> None:
    reference, ours = loaded(tmp_path, zero_cond_t=zero_cond_t)
    latents, contexts, expected = [], [], []
    for seed, (size, sizes, length, time) in enumerate(ROWS):
        torch.manual_seed(seed)
        picture, references = torch.randn(8, *size), [torch.randn(8, *other) for other in sizes]
        shapes = [(1, *grid_of(image)) for image in (picture, *references)]
        velocity = reference(
            torch.cat([packed(image) for image in (picture, *references)], dim=1),
            states(length, seed)[None],
            timestep=torch.tensor([time]),
            img_shapes=[shapes],
            return_dict=False,
        )[0][:, : shapes[0][1] * shapes[0][2]]
        expected.append(unpatchified(velocity, *shapes[0][1:], channels_first=True)[0])
        latents.append(picture)
        grids = tuple(grid_of(other) for other in references)
        contexts.append(Context(ours.encode_text(states(length, seed)), ours.encode_references(references), grids))
    times = 1000 * torch.tensor([time for *_, time in ROWS])
    got = ours.unembed(ours.run_blocks(ours.embed(latents, times, contexts), 0, 3))
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


@torch.no_grad()
def test_chosen_rows_go_on_as_they_would_in_the_whole_batch(tmp_path: Path) -> None:
    """What step caches ask of the batch between two blocks."""
    _, ours = loaded(tmp_path, zero_cond_t=True)
    latents, contexts = [], []
    for seed, (size, sizes, length, _) in enumerate(ROWS):
        torch.manual_seed(seed)
        references = [torch.randn(8, *other) for other in sizes]
        latents.append(torch.randn(8, *size))
        grids = tuple(grid_of(other) for other in references)
        contexts.append(Context(ours.encode_text(states(length, seed)), ours.encode_references(references), grids))
    tokens = ours.run_blocks(ours.embed(latents, 1000 * torch.tensor([time for *_, time in ROWS]), contexts), 0, 1)
    whole = ours.run_blocks(tokens, 1, 3).per_row()
    for chosen in ([0, 3, 4], [1], [2, 5]):
        part = ours.run_blocks(tokens.select(chosen), 1, 3)
        assert part.order == tuple(tokens.order[row] for row in chosen)
        for row, got in zip(chosen, part.per_row(), strict=True):
            assert torch.allclose(got, whole[row], rtol=1e-4, atol=1e-5)
    same = ours.unembed(tokens.with_rows(tokens.per_row()))
    assert all(torch.equal(a, b) for a, b in zip(same, ours.unembed(tokens), strict=True))


@torch.no_grad()
def test_the_modulated_input_is_what_the_first_block_attends_with(tmp_path: Path) -> None:
    reference, ours = loaded(tmp_path)
    latents, text, time = torch.randn(8, 4, 6), states(5, 0), torch.tensor([0.7])
    seen: dict[str, torch.Tensor] = {}
    attention = reference.transformer_blocks[0].attn
    attention.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    reference(packed(latents), text[None], timestep=time, img_shapes=[[(1, 2, 3)]])
    tokens = ours.embed([latents], 1000 * time, [Context(ours.encode_text(text), ours.encode_references([]), ())])
    expected = torch.cat([seen["encoder_hidden_states"][0], seen["hidden_states"][0]])
    assert (ours.modulated_input(tokens)[0] - expected).abs().max() < 1e-5 * expected.abs().max()


# transformer/config.json of Qwen/Qwen-Image, as of Qwen/Qwen-Image-2512 and Qwen/Qwen-Image-Edit-2509.
PUBLISHED: dict[str, Any] = dict(
    attention_head_dim=128,
    axes_dims_rope=[16, 56, 56],
    guidance_embeds=False,
    in_channels=64,
    joint_attention_dim=3584,
    num_attention_heads=24,
    num_layers=60,
    out_channels=16,
    patch_size=2,
)
PUBLISHED_2511 = {**PUBLISHED, "zero_cond_t": True}  # of Qwen/Qwen-Image-Edit-2511


@pytest.mark.parametrize("published", [{**PUBLISHED, "pooled_projection_dim": 768}, PUBLISHED_2511])
def test_published_names_and_shapes_load_with_nothing_missing_and_nothing_left_over(published: dict[str, Any]) -> None:
    with torch.device("meta"):
        config = QwenImageConfig.from_dict(published)
        reference = QwenImageTransformer2DModel(**{k: v for k, v in published.items() if k != "pooled_projection_dim"})
        ours = QwenImageTransformer(config)
    assert config.zero_cond_t is reference.config.zero_cond_t
    shapes = {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    assert len(plan_loading(ours, shapes, "published")) == len(shapes)


def test_missing_left_over_and_misshapen_tensors_are_named() -> None:
    reference = random_transformer()
    ours = QwenImageTransformer(QwenImageConfig.from_dict(dict(reference.config)))
    shapes = {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    name = "transformer_blocks.1.attn.add_k_proj.weight"
    with pytest.raises(CheckpointError, match=r"blocks\.1\.text\.qkv\.weight"):
        plan_loading(ours, {k: v for k, v in shapes.items() if k != name}, "x")
    with pytest.raises(CheckpointError, match=r"add_k_proj.*\[1, 2\].*expected \[48, 48\]"):
        plan_loading(ours, {**shapes, name: (1, 2)}, "x")
    with pytest.raises(CheckpointError, match=r"unexpected tensor 'transformer_blocks\.9\.x'"):
        plan_loading(ours, {**shapes, "transformer_blocks.9.x": (1,)}, "x")


@pytest.mark.parametrize(
    "change, key",
    [
        ({"guidance_embeds": True}, "guidance_embeds"),
        ({"use_additional_t_cond": True}, "use_additional_t_cond"),
        ({"use_layer3d_rope": True}, "use_layer3d_rope"),
        ({"zero_cond_t": "yes"}, "zero_cond_t"),
        ({"patch_size": 1}, "patch_size"),
        ({"out_channels": None}, "out_channels"),
        ({"in_channels": 60}, "in_channels"),
        ({"axes_dims_rope": [16, 56, 54]}, "axes_dims_rope"),
        ({"axes_dims_rope": [128]}, "axes_dims_rope"),
        ({"num_layers": 10**9}, "num_layers"),
    ],
)
def test_what_the_model_does_not_compute_is_refused(change: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        QwenImageConfig.from_dict({**PUBLISHED, **change})
