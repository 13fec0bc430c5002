"""The native ACE-Step transformer against diffusers, on random small weights in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AceStepTransformer1DModel
from support.ace_step import CHANNELS, TEXT_WIDTH, random_transformer
from torch import Tensor

from vllm_omni.errors import CheckpointError, ConfigError
from vllm_omni.layers.band import Band
from vllm_omni.layers.banded import attention, banded_attention, blockwise_attention, short_attention
from vllm_omni.layers.weights import plan_loading
from vllm_omni.models.ace_step.config import AceStepConfig
from vllm_omni.models.ace_step.frames import RowCondition
from vllm_omni.models.ace_step.transformer import AceStepTransformer

BASE = dict(
    hidden_size=2048,
    intermediate_size=6144,
    num_hidden_layers=24,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    in_channels=192,
    audio_acoustic_hidden_dim=64,
    patch_size=2,
    rope_theta=1000000,
    attention_bias=False,
    attention_dropout=0.0,
    rms_norm_eps=1e-6,
    sliding_window=128,
)
XL = dict(
    BASE,
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=32,
    num_attention_heads=32,
    encoder_hidden_size=2048,
    is_turbo=True,
)
CPU = torch.device("cpu")


class Row:
    """One row's inputs, [T, C], [T, 2 C] and [t, E], and the reference's answer to them alone."""

    def __init__(self, num_frames: int, num_text: int, timestep: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.latents = torch.randn(num_frames, CHANNELS, generator=generator)
        self.context = torch.randn(num_frames, 2 * CHANNELS, generator=generator)
        self.text = torch.randn(num_text, TEXT_WIDTH, generator=generator)
        self.timestep = timestep

    def expected(self, reference: AceStepTransformer1DModel) -> Tensor:
        time = torch.tensor([self.timestep])
        inputs = (self.latents[None], time, time, self.text[None], self.context[None])
        return reference(*inputs, return_dict=False)[0][0]

    def condition(self, model: AceStepTransformer) -> RowCondition:
        return RowCondition(model.encode_text(self.text), model.encode_context(self.context))


ROWS = [
    Row(40, 6, 1.0, 0),
    Row(7, 1, 0.3, 1),
    Row(39, 30, 0.999, 2),
    Row(1, 5, 0.5, 3),
    Row(150, 9, 0.0, 4),
    Row(2, 2, 0.7, 5),
]


def loaded(folder: Path, reference: AceStepTransformer1DModel) -> AceStepTransformer:
    reference.save_pretrained(folder)
    return AceStepTransformer.load(folder, AceStepConfig.from_dict(reference.config), CPU, torch.float32)


def velocities(model: AceStepTransformer, rows: list[Row]) -> list[Tensor]:
    times = torch.tensor([row.timestep for row in rows])
    return model([row.latents for row in rows], times, [row.condition(model) for row in rows])


def assert_near(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"encoder_hidden_size": None, "hidden_size": TEXT_WIDTH},
        {"attention_bias": True, "num_key_value_heads": 4},
        {"patch_size": 3, "layer_types": ["full_attention", "sliding_attention"], "num_hidden_layers": 2},
        {"patch_size": 1, "sliding_window": 70},
        {"sliding_window": 1, "layer_types": ["sliding_attention"] * 4},
    ],
)
@torch.no_grad()
def test_velocities_of_a_mixed_batch_equal_the_reference(tmp_path: Path, change: dict[str, Any]) -> None:
    reference = random_transformer(**change)
    ours = loaded(tmp_path, reference)
    for row, got in zip(ROWS, velocities(ours, ROWS), strict=True):
        assert_near(got, row.expected(reference))


@torch.no_grad()
def test_every_part_of_a_rows_input_matters(tmp_path: Path) -> None:
    """A parity test over inputs that do not matter would prove nothing."""
    ours = loaded(tmp_path, random_transformer())
    for name in ("latents", "context", "text", "timestep"):
        row, other = Row(40, 6, 0.5, 0), Row(40, 6, 0.5, 0)
        setattr(other, name, getattr(Row(40, 6, 0.9, 1), name))
        a, b = velocities(ours, [row, other])
        assert (a - b).abs().max() > 1e-2 * a.abs().max(), name


@torch.no_grad()
def test_a_row_alone_equals_itself_in_a_crowd_in_any_order(tmp_path: Path) -> None:
    ours = loaded(tmp_path, random_transformer())
    together, backwards = velocities(ours, ROWS), velocities(ours, ROWS[::-1])[::-1]
    for row, crowd, other in zip(ROWS, together, backwards, strict=True):
        assert_near(crowd, velocities(ours, [row])[0], 1e-6)
        assert_near(other, crowd, 1e-6)


@torch.no_grad()
def test_rows_that_share_a_text_read_it_in_one_call_and_equal_rows_that_do_not(tmp_path: Path) -> None:
    ours, row = loaded(tmp_path, random_transformer()), ROWS[0]
    shared = row.condition(ours)
    others = [RowCondition(shared.cross_attention, ours.encode_context(r.context)) for r in (ROWS[4], ROWS[0], ROWS[4])]
    own = [RowCondition(ours.encode_text(row.text), condition.context) for condition in others]
    latents, times = [ROWS[4].latents, row.latents, ROWS[4].latents], torch.tensor([0.2, 0.4, 0.8])
    batch = ours.embed(latents, times, others)
    assert [tokens for tokens, _ in batch.cross_attention_spans()] == [slice(0, len(batch.hidden))]
    for got, expected in zip(ours(latents, times, others), ours(latents, times, own), strict=True):
        assert_near(got, expected, 1e-6)


@torch.no_grad()
def test_chosen_rows_go_on_as_they_would_have_in_the_whole_batch(tmp_path: Path) -> None:
    """What step caches do: some packed rows leave after the first block and come back."""
    ours = loaded(tmp_path, random_transformer())
    times = torch.tensor([row.timestep for row in ROWS])
    tokens = ours.embed([row.latents for row in ROWS], times, [row.condition(ours) for row in ROWS])
    tokens = ours.run_blocks(tokens, 0, 1)
    whole = ours.run_blocks(tokens, 1, 4)
    rows = tokens.per_row()
    for chosen in ([1], [0, 2, 5], [3, 4], list(range(6))):
        part = ours.run_blocks(tokens.select(chosen), 1, 4)
        assert part.order == tuple(tokens.order[row] for row in chosen)
        for row, hidden in zip(chosen, part.per_row(), strict=True):
            assert_near(hidden, whole.per_row()[row], 1e-6)
            rows[row] = hidden
    for a, b in zip(ours.unembed(tokens.with_rows(rows)), ours.unembed(whole), strict=True):
        assert_near(a, b, 1e-6)


@pytest.mark.parametrize("length, window", [(2, 1), (64, 5), (65, 16), (130, 64), (280, 70), (129, 128), (300, 1)])
def test_attention_of_a_window_equals_the_masked_one_for_every_length(length: int, window: int) -> None:
    query = torch.randn(3, 4, length, 8)
    key, value = torch.randn(2, 3, 2, length, 8)
    positions = torch.arange(length)
    mask = (positions[:, None] - positions).abs() <= window
    expected = attention(query, key, value, mask.expand(3, 1, length, length))
    torch.testing.assert_close(blockwise_attention(query, key, value, Band.window(window)), expected)
    torch.testing.assert_close(banded_attention(query, key, value, Band.window(window)), expected)


@pytest.mark.parametrize("num_heads, num_keys", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("length, num_read", [(1, 1), (7, 30), (130, 9)])
def test_short_attention_equals_the_plain_one(num_heads: int, num_keys: int, length: int, num_read: int) -> None:
    query = torch.randn(3, length, num_heads, 8).transpose(1, 2)
    key, value = torch.randn(2, 3, num_keys, num_read, 8)
    expected = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    torch.testing.assert_close(short_attention(query, key, value), expected)
    torch.testing.assert_close(attention(query, key, value), expected)


@torch.no_grad()
def test_bfloat16_stays_near_float32(tmp_path: Path) -> None:
    reference = random_transformer()
    exact = loaded(tmp_path, reference)
    rough = AceStepTransformer.load(tmp_path, exact.config, CPU, torch.bfloat16)
    for a, b in zip(velocities(rough, ROWS), velocities(exact, ROWS), strict=True):
        assert a.dtype == torch.bfloat16
        assert_near(a.float(), b, 0.05)


@pytest.mark.parametrize("config", [BASE, dict(BASE, is_turbo=True), XL], ids=["base", "turbo", "xl"])
def test_published_names_and_shapes_load_with_nothing_missing_and_nothing_left_over(config: dict[str, Any]) -> None:
    with torch.device("meta"):
        reference = AceStepTransformer1DModel(**config)
        ours = AceStepTransformer(AceStepConfig.from_dict(config))
    shapes = {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    assert len(plan_loading(ours, shapes, "published")) == len(shapes)


def test_missing_left_over_and_misshapen_tensors_are_named() -> None:
    reference = random_transformer()
    ours = AceStepTransformer(AceStepConfig.from_dict(reference.config))
    shapes = {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    name = "layers.1.cross_attn.to_k.weight"
    with pytest.raises(CheckpointError, match=r"layers\.1\.cross_attn\.keys_values\.weight"):
        plan_loading(ours, {k: v for k, v in shapes.items() if k != name}, "x")
    with pytest.raises(CheckpointError, match=r"to_k.*\[1, 2\].*expected \[32, 48\]"):
        plan_loading(ours, {**shapes, name: (1, 2)}, "x")
    for unknown in ("layers.9.self_attn.to_q.weight", "silence", "layers.0.mlp.gate.weight"):
        with pytest.raises(CheckpointError, match=f"unexpected tensor '{unknown}'"):
            plan_loading(ours, {**shapes, unknown: (1,)}, "x")


@pytest.mark.parametrize(
    "change, key",
    [
        ({"in_channels": 128}, "in_channels: got 128, expected 192"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types: got 3"),
        ({"layer_types": ["linear_attention"] * 24}, "layer_types.*linear_attention"),
        ({"num_key_value_heads": 5}, "5 key-value heads"),
        ({"head_dim": 127}, "head_dim 127"),
        ({"hidden_size": None}, "hidden_size: got None"),
        ({"patch_size": 0}, "patch_size: got 0"),
        ({"sliding_window": 0}, "sliding_window: got 0"),
        ({"rope_theta": "much"}, "rope_theta: got 'much'"),
    ],
)
def test_what_the_model_does_not_compute_is_refused(change: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        AceStepConfig.from_dict({**BASE, **change})
