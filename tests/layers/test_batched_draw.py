"""Tokens of many rows drawn at once: by the settings of each row, and by nothing else."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.draws import expected_shares
from torch import Tensor

from vllm_omni.layers import batched_draw
from vllm_omni.layers.batched_draw import BatchedDraw, DrawSettings, bisected_least, least_of_mass

SETTINGS = (
    DrawSettings(),
    DrawSettings(temperature=0.0),
    DrawSettings(temperature=0.7, top_k=3),
    DrawSettings(temperature=1.3, top_p=0.6),
    DrawSettings(temperature=2.0, top_k=9, top_p=0.8),
    DrawSettings(top_k=1),
    DrawSettings(temperature=1.5, min_p=0.1),
    DrawSettings(top_p=0.9, min_p=0.05, top_k=30),
    DrawSettings(temperature=0.8, top_p=0.7, min_p=0.2),
)
CPU = torch.device("cpu")


def draw(settings: DrawSettings, logits: Tensor, uniforms: Tensor) -> Tensor:
    """One row by many numbers."""
    rows = logits.expand(len(uniforms), -1)
    return BatchedDraw([settings] * len(uniforms), len(logits), CPU).draw(rows, uniforms)


def even(count: int) -> Tensor:
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def defined(settings: DrawSettings, logits: Tensor, uniform: float) -> tuple[int, float]:
    """In float64, one token after the other -> the token, and how far the number is from the border of another."""
    order = logits.argsort(descending=True, stable=True)
    if settings.top_k:
        order = order[: settings.top_k]
    chances = (logits[order].double() / settings.temperature).softmax(0)
    before = chances.cumsum(0) - chances
    if not settings.top_k:  # what is equal stays together
        before = before[torch.searchsorted(-chances, -chances)]
    is_kept = (before < settings.top_p) & (chances >= settings.min_p * chances.max())
    borders = [(before - settings.top_p).abs()] if settings.top_p < 1 else []
    borders += [(chances / chances.max() - settings.min_p).abs()] if settings.min_p else []
    chances, order = chances[is_kept], order[is_kept]
    if not settings.top_k:
        by_token = order.argsort()
        chances, order = chances[by_token], order[by_token]
    ends = (chances / chances.sum()).cumsum(0)
    place = min(int(torch.searchsorted(ends, uniform, right=True)), len(ends) - 1)
    return int(order[place]), float(torch.cat([*borders, (ends[:-1] - uniform).abs(), torch.ones(1)]).min())


@pytest.mark.parametrize("vocab_size", [40, 5120, 6001])
@pytest.mark.parametrize("at_once", [2**18, 30_000])
def test_a_token_is_what_one_by_one_gives(vocab_size: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short, of whole chunks, and with a rest; ties everywhere; all rows at once and part by part."""
    monkeypatch.setattr(batched_draw, "numbers_at_once", lambda device: at_once)
    generator = torch.Generator().manual_seed(2)
    rows = [settings for settings in SETTINGS if settings.temperature] * 4
    logits = (torch.randn(len(rows), vocab_size, generator=generator) * 3).mul(4).round().div(4)
    uniforms = torch.rand(len(rows), generator=generator, dtype=torch.float64)
    tokens = BatchedDraw(rows, vocab_size, CPU).draw(logits, uniforms).tolist()
    num_near = 0
    for settings_of_row, row, uniform, token in zip(rows, logits, uniforms.tolist(), tokens, strict=True):
        expected, distance = defined(settings_of_row, row, uniform)
        num_near += distance < 1e-6
        assert token == expected or distance < 1e-6
    assert num_near < len(rows) // 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_and_without_kernels_a_rank_is_the_same_token(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 many logits of a large vocabulary are equal, also at the last place that top_k keeps."""
    generator = torch.Generator().manual_seed(3)
    rows = [DrawSettings(temperature=1.5, top_k=1 + 7 * index, top_p=0.99) for index in range(20)]
    logits = (torch.randn(len(rows), 30_011, generator=generator) * 3).to(dtype)
    uniforms = torch.rand(len(rows), generator=generator, dtype=torch.float64)
    found = BatchedDraw(rows, 30_011, CPU).draw(logits, uniforms)
    monkeypatch.setattr(batched_draw, "find_top", lambda logits, count: None)
    assert torch.equal(found, BatchedDraw(rows, 30_011, CPU).draw(logits, uniforms))
    for settings_of_row, row, uniform, token in zip(rows, logits, uniforms.tolist(), found.tolist(), strict=True):
        expected, distance = defined(settings_of_row, row, uniform)
        assert token == expected or distance < 1e-6


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 5.0, 50.0])
def test_of_a_long_row_only_what_is_likely_is_sorted_and_the_least_is_the_same(scale: float) -> None:
    logits = torch.randn(6, 20_000, generator=torch.Generator().manual_seed(4)) * scale
    probabilities, top_p = logits.softmax(-1), torch.tensor([[0.5], [0.9], [0.999_999], [1e-6], [1.0], [0.0]])
    ordered = probabilities.sort(descending=True).values
    is_kept = ordered.cumsum(-1) - ordered < top_p
    expected = ordered.masked_fill(~is_kept, torch.inf).amin(-1, keepdim=True).masked_fill(top_p >= 1, 0)
    assert torch.equal(least_of_mass(probabilities, top_p), expected)
    assert least_of_mass(torch.full((2, 50), torch.nan), torch.tensor([[0.5], [1.0]])).shape == (2, 1)


@hypothesis.settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.integers(1, 500), scale=st.sampled_from([0.0, 0.5, 8.0]))
def test_halving_finds_what_sorting_finds(seed: int, size: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(4, size, generator=generator) * scale).mul(8).round().div(8)
    probabilities, top_p = logits.softmax(-1), torch.tensor([[0.3], [0.9], [1e-9], [0.5]])
    ordered = probabilities.double().sort(descending=True).values.cumsum(-1)
    is_clear = ((ordered - top_p).abs() > 1e-6).all(-1)
    found, expected = bisected_least(probabilities, top_p), least_of_mass(probabilities, top_p)
    assert torch.equal(found[is_clear], expected[is_clear])


def test_tokens_come_as_often_as_their_probabilities_say() -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0))
    for settings in SETTINGS:
        drawn = draw(settings, logits, even(20_000)).bincount(minlength=12) / 20_000
        torch.testing.assert_close(drawn.double(), expected_shares(logits, settings), rtol=0, atol=1e-3)


def test_a_row_draws_the_same_among_mates_whatever_they_ask_for() -> None:
    """Rounded logits: many are equal, also at the last place that top_k keeps."""
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(len(SETTINGS), 64, generator=generator) * 4).round().div(4).bfloat16()
    uniforms = torch.rand(40, len(SETTINGS), generator=generator, dtype=torch.float64)
    together = [BatchedDraw(SETTINGS, 64, CPU).draw(logits, numbers) for numbers in uniforms]
    for row, settings in enumerate(SETTINGS):
        alone = draw(settings, logits[row], uniforms[:, row])
        assert alone.tolist() == [tokens[row].item() for tokens in together]


def test_the_largest_number_draws_a_token_that_can_be_drawn() -> None:
    logits = torch.tensor([0.0, 5.0, -torch.inf, 1.0, -torch.inf])
    almost = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(DrawSettings(), logits, almost).tolist() == [0, 3]


@pytest.mark.cuda
def test_a_device_draws_what_the_cpu_draws(gpu: torch.device) -> None:
    """But for numbers that fall where rounding decides: of 120 rows of a large vocabulary next to none."""
    generator = torch.Generator().manual_seed(5)
    rows = [SETTINGS[index % len(SETTINGS)] for index in range(60)]
    logits = (torch.randn(60, 151_936, generator=generator) * 3).bfloat16()
    there, here = (BatchedDraw(rows, 151_936, device) for device in (gpu, CPU))
    for _ in range(2):
        uniforms = torch.rand(60, generator=generator, dtype=torch.float64)
        drawn = there.draw(logits.to(gpu), uniforms.to(gpu)).cpu()
        assert (drawn != here.draw(logits, uniforms)).sum() <= 1
    spoilt = torch.full((60, 5000), torch.nan, device=gpu)  # no place outside is read
    assert BatchedDraw(rows, 5000, gpu).draw(spoilt, uniforms.to(gpu)).cpu().max() < 5000
