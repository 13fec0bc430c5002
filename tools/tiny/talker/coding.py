"""From samples to codes, which only training does: an encoder of frames, and residual books of codes.

Silent frames have the latent zero, and the row zero of every book.
Legend: B rows, n frames, Q books, V codes of a book, N vectors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.tiny.talker.shapes import FRAME_SAMPLES, NUM_CODES, NUM_GROUPS, codec_config

STRIDES, WIDTHS = (5, 6, 8, 8), (32, 64, 128, 192)
LATENT = codec_config()["decoder_config"]["codebook_dim"]
WIDTH = LATENT // 2  # of a row
DECAY, RARE = 0.99, 0.05
QUIET = 1e-4


class Encoder(nn.Module):
    """[B, n * 1920] -> [B, n, LATENT], of frames and a little of what is around them; of silence zeros."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, *WIDTHS)
        self.down = nn.ModuleList(
            nn.Conv1d(widths[place], widths[place + 1], 2 * stride, stride) for place, stride in enumerate(STRIDES)
        )
        self.mix = nn.ModuleList(nn.Conv1d(width, width, 3, padding=1) for width in WIDTHS)
        self.last = nn.Conv1d(WIDTHS[-1], LATENT, 3, padding=1)

    def forward(self, samples: Tensor) -> Tensor:
        x = samples[:, None]
        for down, mix, stride in zip(self.down, self.mix, STRIDES, strict=True):
            x = F.gelu(down(F.pad(x, (stride - stride // 2, stride // 2))))
            x = x + F.gelu(mix(x))
        is_loud = samples.unflatten(1, (-1, FRAME_SAMPLES)).abs().amax(-1, keepdim=True) > QUIET
        return F.rms_norm(self.last(x).transpose(1, 2), (LATENT,)) * is_loud


class Books(nn.Module):
    """Two projections of a latent: the first book codes one, the others what is left of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rest = nn.Linear(LATENT, WIDTH, bias=False), nn.Linear(LATENT, WIDTH, bias=False)
        self.register_buffer("rows", torch.zeros(NUM_GROUPS, NUM_CODES, WIDTH))
        self.register_buffer("usage", torch.zeros(NUM_GROUPS, NUM_CODES))
        self.rows: Tensor
        self.usage: Tensor

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, n, LATENT] -> (row of the first book [B, n, WIDTH], sum of the others', how far they are off)."""
        first, rest = self.first(latent), self.rest(latent)
        found = self._quantised(first.detach().flatten(0, 1), rest.detach().flatten(0, 1))
        pairs = [(mine, theirs.view_as(mine)) for mine, theirs in zip((first, rest), found, strict=True)]
        off = sum(((mine - theirs).square().mean() for mine, theirs in pairs), torch.zeros((), device=latent.device))
        passed = [mine + (theirs - mine).detach() for mine, theirs in pairs]
        return passed[0], passed[1], off

    @torch.no_grad()
    def codes(self, latent: Tensor) -> Tensor:
        """[N, LATENT] -> [N, Q]."""
        found, left = [nearest(self.first(latent), self.rows[0])], self.rest(latent)
        for book in range(1, NUM_GROUPS):
            found.append(nearest(left, self.rows[book]))
            left = left - self.rows[book][found[-1]]
        return torch.stack(found, 1)

    @torch.no_grad()
    def refit(self, latent: Tensor, rounds: int = 25) -> None:
        """The books that code these latents best, [N, LATENT], none of them silent: k-means, book after book."""
        left = self.rest(latent)
        for book in range(NUM_GROUPS):
            points = left if book else self.first(latent)
            rows = self.rows[book]
            order = torch.randperm(len(points), device=points.device)
            rows[1:] = points[order[torch.arange(NUM_CODES - 1, device=points.device) % len(points)]]
            for _ in range(rounds):
                sums, counts = gathered(points, nearest(points, rows))
                rows[1:] = torch.where(counts[1:, None] > 0, sums[1:] / counts[1:, None].clamp(min=1), rows[1:])
            if book:
                left = left - rows[nearest(left, rows)]

    def _quantised(self, first: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        """Rows for [N, WIDTH] each; the books follow what they are asked for."""
        is_loud = first.abs().amax(1) > 0
        left, total = rest, torch.zeros_like(rest)
        row = first
        for book in range(NUM_GROUPS):
            points = left if book else first
            codes = nearest(points, self.rows[book])
            chosen = self.rows[book][codes]
            self._follow(book, points, codes, is_loud)
            if book:
                left, total = left - chosen, total + chosen
            else:
                row = chosen
        return row, total

    def _follow(self, book: int, points: Tensor, codes: Tensor, is_loud: Tensor) -> None:
        """Means of what was coded; a row that is rarely used begins anew somewhere else. The row zero stays."""
        rows, usage = self.rows[book], self.usage[book]
        sums, counts = gathered(points * is_loud[:, None], codes, is_loud.to(points.dtype))
        total = rows * usage[:, None] * DECAY + sums * (1 - DECAY)
        usage.mul_(DECAY).add_(counts, alpha=1 - DECAY)
        moved = total / usage[:, None].clamp(min=1e-6)
        places = torch.multinomial(is_loud.float() + 1e-6, NUM_CODES, replacement=True)
        is_rare = (usage < RARE)[:, None]
        rows[1:] = torch.where(is_rare, points[places], moved)[1:]
        usage.copy_(torch.where(is_rare[:, 0], 2 * RARE, usage))


def nearest(points: Tensor, rows: Tensor) -> Tensor:
    """[N, width], [V, width] -> [N]."""
    return (rows.square().sum(1) - 2 * points @ rows.T).argmin(1)


def gathered(points: Tensor, codes: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(sums of the points of each code [V, width], their number [V])."""
    weights = torch.ones_like(points[:, 0]) if weights is None else weights
    sums = points.new_zeros(NUM_CODES, points.shape[1]).index_add_(0, codes, points)
    return sums, points.new_zeros(NUM_CODES).index_add_(0, codes, weights)
