"""Tokens of many rows drawn at once: by the settings of each row, and by nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_omni.layers.batched_draw import BatchedDraw, DrawSettings

SETTINGS = (
    DrawSettings(),
    DrawSettings(temperature=0.0),
    DrawSettings(temperature=0.7, top_k=3),
    DrawSettings(temperature=1.3, top_p=0.6),
    DrawSettings(temperature=2.0, top_k=9, top_p=0.8),
    DrawSettings(top_k=1),
)
CPU = torch.device("cpu")


def draw(settings: DrawSettings, logits: Tensor, uniforms: Tensor) -> Tensor:
    """One row by many numbers."""
    rows = logits.expand(len(uniforms), -1)
    return BatchedDraw([settings] * len(uniforms), len(logits), CPU).draw(rows, uniforms)


def even(count: int) -> Tensor:
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def test_tokens_come_as_often_as_their_probabilities_say() -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0))
    for settings in SETTINGS:
        expected = torch.zeros(12, dtype=torch.float64)
        order = logits.argsort(descending=True)[: settings.top_k or 12]
        if settings.temperature == 0:
            order = order[:1]
        expected[order] = (logits[order].double() / (settings.temperature or 1)).softmax(0)
        ranked = expected.sort(descending=True)
        expected[ranked.indices[ranked.values.cumsum(0) - ranked.values >= settings.top_p]] = 0
        expected /= expected.sum()
        drawn = draw(settings, logits, even(20_000)).bincount(minlength=12) / 20_000
        torch.testing.assert_close(drawn.double(), expected, rtol=0, atol=1e-3)


def test_a_row_draws_the_same_among_mates_whatever_they_ask_for() -> None:
    """Rounded logits: many are equal, also at the last place that top_k keeps."""
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(6, 64, generator=generator) * 4).round().div(4).bfloat16()
    uniforms = torch.rand(40, 6, generator=generator, dtype=torch.float64)
    together = [BatchedDraw(SETTINGS, 64, CPU).draw(logits, numbers) for numbers in uniforms]
    for row, settings in enumerate(SETTINGS):
        alone = draw(settings, logits[row], uniforms[:, row])
        assert alone.tolist() == [tokens[row].item() for tokens in together]


def test_the_largest_number_draws_a_token_that_can_be_drawn() -> None:
    logits = torch.tensor([0.0, 5.0, -torch.inf, 1.0, -torch.inf])
    almost = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(DrawSettings(), logits, almost).tolist() == [0, 3]
