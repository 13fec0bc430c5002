"""The native FLUX.2 transformer against diffusers', on random small weights in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor
from support.flux2 import random_transformer, states
from torch import Tensor

from vllm_omni.errors import ConfigError
from vllm_omni.layers.weights import load_weights, plan_loading
from vllm_omni.models.flux2.config import Flux2Config
from vllm_omni.models.flux2.transformer import Condition, Flux2Transformer, Reference

# src/flux2/model.py of github.com/black-forest-labs/flux2: Klein4BParams and Klein9BParams, by their diffusers names.
KLEIN = dict(
    in_channels=128,
    attention_head_dim=128,
    mlp_ratio=3.0,
    axes_dims_rope=[32, 32, 32, 32],
    rope_theta=2000,
    guidance_embeds=False,
)
PUBLISHED = {
    "4B": dict(KLEIN, num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680),
    "9B": dict(KLEIN, num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12288),
}
SIZES = ((4, 4), (2, 6), (4, 4), (6, 2), (4, 4))
LENGTHS = (5, 1, 5, 9, 5)
REFERENCES: tuple[tuple[tuple[int, int], ...], ...] = ((), ((3, 2),), (), ((3, 2), (2, 5)), ((1, 1), (2, 2), (3, 3)))


def loaded(reference: Flux2Transformer2DModel, folder: Path) -> Flux2Transformer:
    reference.save_pretrained(folder)
    model = Flux2Transformer(Flux2Config.from_folder(folder))
    load_weights(model, folder)
    return model


def ids(*grids: tuple[int, int], first: int = 0) -> Tensor:
    """[1, tokens, 4] as the reference pipeline has them."""
    parts = [
        torch.cartesian_prod(torch.tensor([10 * (index + first)]), torch.arange(h), torch.arange(w), torch.arange(1))
        for index, (h, w) in enumerate(grids)
    ]
    return torch.cat(parts)[None]


def text_ids(length: int) -> Tensor:
    return Flux2KleinPipeline._prepare_text_ids(torch.zeros(1, length, 1))


def as_tokens(latents: Tensor) -> Tensor:
    return latents.flatten(1).T[None]


@pytest.mark.parametrize("guidance_embeds", [False, True])
@torch.no_grad()
def test_velocities_of_a_mixed_batch_equal_the_reference(tmp_path: Path, guidance_embeds: bool) -> None:
    reference = random_transformer(guidance_embeds=guidance_embeds)
    ours = loaded(reference, tmp_path)
    latents = [torch.randn(16, *size) for size in SIZES]
    sources = [[torch.randn(16, *grid) for grid in grids] for grids in REFERENCES]
    times = torch.tensor([1000.0, 300.0, 500.0, 999.0, 1.0])
    guidance = torch.tensor([1.0, 4.0, 2.5, 3.0, 7.0]) if guidance_embeds else None
    conditions = [
        Condition(ours.embed_text(states(length, seed)), tuple(ours.embed_reference(one) for one in sources[seed]))
        for seed, length in enumerate(LENGTHS)
    ]
    got = ours(latents, times, conditions, guidance)
    for row, velocity in enumerate(got):
        expected = reference(
            hidden_states=torch.cat([as_tokens(one) for one in (latents[row], *sources[row])], dim=1),
            encoder_hidden_states=states(LENGTHS[row], row)[None],
            timestep=times[row : row + 1] / 1000,
            img_ids=ids(SIZES[row], *REFERENCES[row]),
            txt_ids=text_ids(LENGTHS[row]),
            guidance=None if guidance is None else guidance[row : row + 1],
            return_dict=False,
        )[0][:, : SIZES[row][0] * SIZES[row][1]]
        assert (as_tokens(velocity) - expected).abs().max() < 2e-5 * expected.abs().max(), row
        assert expected.std() > 0.1


@torch.no_grad()
def test_remembered_references_equal_those_that_the_reference_extracts(tmp_path: Path) -> None:
    reference = random_transformer()
    ours = loaded(reference, tmp_path)
    for block in reference.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in reference.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    latents = [torch.randn(16, *size) for size in SIZES]
    sources = [[torch.randn(16, *grid) for grid in grids] for grids in REFERENCES]
    times = torch.tensor([1000.0, 300.0, 500.0, 999.0, 1.0])

    def condition(row: int) -> Condition:
        text = ours.embed_text(states(LENGTHS[row], row))
        embedded = [ours.embed_reference(one) for one in sources[row]]
        return Condition(text, remembered=ours.remember(embedded) if embedded else None)

    conditions = [condition(row) for row in range(len(SIZES))]
    for row, velocity in enumerate(ours(latents, times, conditions)):
        given: dict[str, Any] = dict(
            encoder_hidden_states=states(LENGTHS[row], row)[None],
            timestep=times[row : row + 1] / 1000,
            txt_ids=text_ids(LENGTHS[row]),
            return_dict=False,
        )
        if not sources[row]:
            plain = reference(hidden_states=as_tokens(latents[row]), img_ids=ids(SIZES[row]), **given)
            assert (as_tokens(velocity) - plain[0]).abs().max() < 2e-5 * plain[0].abs().max()
            continue
        packed = torch.cat([as_tokens(one) for one in sources[row]], dim=1)
        extracting, cache = reference(
            hidden_states=torch.cat([packed, as_tokens(latents[row])], dim=1),
            img_ids=torch.cat([ids(*REFERENCES[row], first=1), ids(SIZES[row])], dim=1),
            kv_cache_mode="extract",
            num_ref_tokens=packed.shape[1],
            **given,
        )
        cached = reference(
            hidden_states=as_tokens(latents[row]),
            img_ids=ids(SIZES[row]),
            kv_cache=cache,
            kv_cache_mode="cached",
            **given,
        )[0]
        for expected in (extracting, cached):
            assert (as_tokens(velocity) - expected).abs().max() < 2e-5 * expected.abs().max(), row


@torch.no_grad()
def test_blocks_can_be_run_in_parts_and_for_some_rows(tmp_path: Path) -> None:
    """As step caches do, across the border between blocks with two streams and single ones."""
    ours = loaded(random_transformer(), tmp_path)
    latents = [torch.randn(16, *size) for size in SIZES]
    conditions = [
        Condition(ours.embed_text(states(length, seed)), tuple(random_reference(ours, grid) for grid in grids))
        for seed, (length, grids) in enumerate(zip(LENGTHS, REFERENCES, strict=True))
    ]
    last = conditions[-1]
    conditions[-1] = Condition(last.text, remembered=ours.remember(last.references))
    tokens = ours.embed(latents, torch.tensor([1000.0, 300.0, 500.0, 999.0, 1.0]), conditions)
    whole = ours.run_blocks(tokens, 0, 5).per_row()
    for border in range(1, 5):
        first = ours.run_blocks(tokens, 0, border)
        parted = ours.run_blocks(first.with_rows(first.per_row()), border, 5).per_row()
        chosen = ours.run_blocks(first.select([1, 3, 4]), border, 5).per_row()
        for got, expected in zip(parted, whole, strict=True):
            assert torch.allclose(got, expected, atol=1e-4), border
        for got, row in zip(chosen, [1, 3, 4], strict=True):
            assert torch.allclose(got, whole[row], atol=1e-4), border
    again = tokens.with_rows(tokens.per_row())
    for modulated, row in zip(ours.modulated_input(again), tokens.per_row(), strict=True):
        assert modulated.shape == row.shape and not torch.allclose(modulated, row)


def random_reference(model: Flux2Transformer, grid: tuple[int, int]) -> Reference:
    return model.embed_reference(torch.randn(16, *grid))


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_names_and_shapes_load_with_nothing_missing_and_nothing_left_over(size: str) -> None:
    with torch.device("meta"):
        reference = Flux2Transformer2DModel(**PUBLISHED[size])
        ours = Flux2Transformer(Flux2Config.from_dict(PUBLISHED[size]))
    shapes = {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    assert len(plan_loading(ours, shapes, "published")) == len(shapes)


@pytest.mark.parametrize(
    "key, value",
    [
        ("patch_size", 2),
        ("out_channels", 64),
        ("num_layers", 0),
        ("rope_theta", float("nan")),
        ("axes_dims_rope", [32, 32, 32]),
        ("axes_dims_rope", [16, 32, 32, 32]),
        ("axes_dims_rope", [31, 33, 32, 32]),
        ("guidance_embeds", "yes"),
        ("joint_attention_dim", None),
    ],
)
def test_a_config_that_is_not_computed_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        Flux2Config.from_dict({**PUBLISHED["4B"], key: value})
