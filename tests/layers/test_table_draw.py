"""Draws by a table of settings: what is known of them beforehand changes nothing."""

from __future__ import annotations

import torch
from support.draws import expected_shares

from vllm_omni.layers.batched_draw import DrawSettings
from vllm_omni.layers.table_draw import TableDraw, settings_table

SETTINGS = (
    DrawSettings(),
    DrawSettings(temperature=0.0),
    DrawSettings(temperature=0.7, top_k=3),
    DrawSettings(temperature=1.3, top_p=0.6),
    DrawSettings(temperature=2.0, top_k=9, top_p=0.8),
    DrawSettings(top_k=1),
)


def test_a_draw_that_knows_no_settings_beforehand_draws_the_same() -> None:
    """As in a graph, which is replayed with others in the table. Rounded logits: many are equal."""
    generator = torch.Generator().manual_seed(2)
    logits = (torch.randn(6, 64, generator=generator) * 4).round().div(4)
    table = torch.zeros(4, 6, dtype=torch.float64)
    for rows in (SETTINGS, SETTINGS[1:2] * 6, SETTINGS[:1] * 6, SETTINGS[2:3] * 6):
        table.copy_(torch.from_numpy(settings_table(rows, 64)))
        for numbers in torch.rand(20, 6, generator=generator, dtype=torch.float64):
            known = TableDraw(table, 64, rows).draw(logits, numbers)
            assert TableDraw(table, 64).draw(logits, numbers).tolist() == known.tolist()


def test_tokens_come_as_often_as_their_probabilities_say() -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0))
    uniforms = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    for settings in SETTINGS:
        table = torch.from_numpy(settings_table([settings], 12)).expand(-1, 20_000)
        drawn = TableDraw(table, 12).draw(logits.expand(20_000, -1), uniforms).bincount(minlength=12) / 20_000
        torch.testing.assert_close(drawn.double(), expected_shares(logits, settings), rtol=0, atol=1e-3)


def test_the_least_temperature_and_top_p_take_the_most_likely_token() -> None:
    logits = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)) * 8
    uniforms = torch.tensor([0.1, 0.5, 0.9, 0.999], dtype=torch.float64)
    for settings in (DrawSettings(temperature=1e-300), DrawSettings(temperature=1e-40, top_k=9), DrawSettings(top_p=0)):
        rows = [settings] * 4
        table = torch.from_numpy(settings_table(rows, 64))
        for drawn in (TableDraw(table, 64, rows), TableDraw(table, 64)):
            assert drawn.draw(logits, uniforms).tolist() == logits.argmax(-1).tolist(), settings
