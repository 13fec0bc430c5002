"""Batches of transformers with two streams: tokens of text, and of images, which are a picture and its references.

Rows of different lengths lie packed without padding, the streams apart, or (`both`) one row's text before its image.
Rows of equal geometry stand together as a group. Knows no weights and no positions.

Legend: R rows, Nt, Ni packed tokens of text and of images, N of both, L tokens of a row, D width, H heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vllm_omni.layers.banded import attention
from vllm_omni.layers.heads import HeadShape, placed_heads
from vllm_omni.worker.diffusion.packing import HeadNorms, Seen, Span, chosen_runs, joined, runs


@dataclass(frozen=True, slots=True, order=True)
class Geometry:
    """What two rows must share to be computed as one dense tensor."""

    num_text: int
    grids: tuple[tuple[int, int], ...]  # height and width in patches, of the picture, then of each reference
    num_remembered: int = 0  # tokens that are no longer computed: their keys and values are known

    @property
    def num_picture(self) -> int:
        return self.grids[0][0] * self.grids[0][1]

    @property
    def num_image(self) -> int:
        """Tokens of the picture and its references."""
        return sum(height * width for height, width in self.grids)

    @property
    def length(self) -> int:
        return self.num_text + self.num_image


@dataclass(frozen=True, slots=True)
class Group:
    """Neighbouring rows of one geometry."""

    rows: slice  # of the packed rows
    geometry: Geometry

    @property
    def num_rows(self) -> int:
        return self.rows.stop - self.rows.start


@dataclass(frozen=True, slots=True)
class JointTokens:
    """All rows between two blocks: a TokenBatch."""

    text: Tensor  # [Nt, D]
    image: Tensor  # [Ni, D]
    condition: Tensor  # [R, ...], from the timestep
    groups: tuple[Group, ...]
    order: tuple[int, ...]  # packed row -> the caller's row
    remembered: tuple[Tensor | None, ...] = ()  # of each row, where `num_remembered`: [layers, 2, H, tokens, d]

    @property
    def packings(self) -> tuple[Sequence[int], ...]:
        """Of text, of images, of both, and of what comes from the timestep."""
        rows = self._geometries()
        text, image = [row.num_text for row in rows], [row.num_image for row in rows]
        return text, image, [row.length for row in rows], [1] * len(rows)

    def content(self) -> tuple[Any, list[Tensor]]:
        """See SharedTokens; of rows that remember nothing."""
        assert not any(kept is not None for kept in self.remembered), "what rows remember is not sent"
        groups = [
            [group.rows.start, group.rows.stop, group.geometry.num_text, group.geometry.grids] for group in self.groups
        ]
        return [groups, self.order], [self.text, self.image, self.condition]

    @classmethod
    def of_content(cls, plain: Any, tensors: Sequence[Tensor]) -> JointTokens:
        """What `content` gave, on another rank."""
        groups, order = plain
        made = [
            Group(slice(start, stop), Geometry(num_text, tuple((height, width) for height, width in grids)))
            for start, stop, num_text, grids in groups
        ]
        text, image, condition = tensors
        return cls(text, image, condition, tuple(made), tuple(order))

    def per_row(self) -> list[Tensor]:
        """[L, D], text then image, in packed order."""
        return [torch.cat(pair) for pair in zip(*self._streams(), strict=True)]

    def with_rows(self, rows: Sequence[Tensor]) -> JointTokens:
        """The same batch with other hidden states: [L, D] each, in packed order."""
        pairs = [
            row.split([geometry.num_text, geometry.num_image])
            for row, geometry in zip(rows, self._geometries(), strict=True)
        ]
        text, image = (torch.cat(stream) for stream in zip(*pairs, strict=True))
        return replace(self, text=text, image=image)

    def select(self, rows: Sequence[int]) -> JointTokens:
        """The chosen packed rows (ascending) as tokens of their own."""
        text, image = self._streams()
        return JointTokens(
            torch.cat([text[row] for row in rows]),
            torch.cat([image[row] for row in rows]),
            self.condition[list(rows)],
            chosen_runs(self.groups, rows),
            tuple(self.order[row] for row in rows),
            tuple(self.remembered[row] for row in rows) if self.remembered else (),
        )

    def both(self) -> Tensor:
        """[N, D]: the streams joined row by row."""
        texts = self._dense(self.text, [group.geometry.num_text for group in self.groups])
        images = self._dense(self.image, [group.geometry.num_image for group in self.groups])
        return joined([torch.cat(pair, dim=1).flatten(0, 1) for pair in zip(texts, images, strict=True)])

    def with_both(self, hidden: Tensor) -> JointTokens:
        """The same batch with other hidden states: [N, D], as `both` gives them."""
        rows = self._dense(hidden, [group.geometry.length for group in self.groups])
        texts = [part[:, : group.geometry.num_text] for part, group in zip(rows, self.groups, strict=True)]
        images = [part[:, group.geometry.num_text :] for part, group in zip(rows, self.groups, strict=True)]
        return replace(
            self,
            text=joined([part.flatten(0, 1) for part in texts]),
            image=joined([part.flatten(0, 1) for part in images]),
        )

    def pictures(self, image: Tensor) -> list[Tensor]:
        """image: [Ni, any] -> [rows, tokens of the picture, any] of each group, without the references."""
        rows = self._dense(image, [group.geometry.num_image for group in self.groups])
        return [part[:, : group.geometry.num_picture] for part, group in zip(rows, self.groups, strict=True)]

    def _geometries(self) -> list[Geometry]:
        return [group.geometry for group in self.groups for _ in range(group.num_rows)]

    def _streams(self) -> tuple[list[Tensor], list[Tensor]]:
        """Views of each row's text and image."""
        geometries = self._geometries()
        text = self.text.split([geometry.num_text for geometry in geometries])
        image = self.image.split([geometry.num_image for geometry in geometries])
        return list(text), list(image)

    def _dense(self, packed: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """[rows, length, any] of each group, lengths being those of its rows."""
        shapes = [(group.num_rows, length) for group, length in zip(self.groups, lengths, strict=True)]
        parts = packed.split([rows * length for rows, length in shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]


@dataclass(frozen=True, slots=True)
class JointSpans:
    """Where the rows of each group lie, in each of the streams and in both joined."""

    text: tuple[Span, ...]
    image: tuple[Span, ...]
    both: tuple[Span, ...]


def packing_order(geometries: Sequence[Geometry]) -> list[int]:
    """The rows, those of one geometry beside each other."""
    return sorted(range(len(geometries)), key=geometries.__getitem__)


def grouped(geometries: Sequence[Geometry]) -> tuple[Group, ...]:
    """Neighbours of one geometry as groups."""
    return tuple(Group(rows, geometry) for rows, geometry in runs(geometries))


def spans_of(groups: Sequence[Group], rope: Callable[[Geometry], Tensor]) -> JointSpans:
    """rope: geometry -> [L, d / 2, 2] of a row's text, then of its image."""
    ropes = [rope(group.geometry) for group in groups]
    texts = [table[: group.geometry.num_text] for table, group in zip(ropes, groups, strict=True)]
    images = [table[group.geometry.num_text :] for table, group in zip(ropes, groups, strict=True)]
    return JointSpans(_spans(groups, texts), _spans(groups, images), _spans(groups, ropes))


def attended_streams(
    text: Tensor,
    image: Tensor,
    spans: JointSpans,
    shape: HeadShape,
    norms: tuple[HeadNorms | None, HeadNorms | None],
    seen: Seen | None = None,
) -> tuple[Tensor, Tensor]:
    """Full attention of both streams within each row. text: [Nt, 3 D], image: [Ni, 3 D], queries, keys and values,
    which are overwritten; norms: of text, of image -> [Nt, D], [Ni, D].
    """
    texts, images = [], []
    for index, (of_text, of_image) in enumerate(zip(spans.text, spans.image, strict=True)):
        placed = (_placed(text, of_text, shape, norms[0]), _placed(image, of_image, shape, norms[1]))
        query, key, value = (_behind(*pair) for pair in zip(*placed, strict=True))  # [rows, H, L, d]
        if seen is not None:
            key, value = seen(index, key, value)
        attended = attention(query, key, value).transpose(1, 2).flatten(2)  # [rows, L, D]
        texts.append(attended[:, : of_text.length].flatten(0, 1))
        images.append(attended[:, of_text.length :].flatten(0, 1))
    return joined(texts), joined(images)


def _placed(qkv: Tensor, span: Span, shape: HeadShape, norms: HeadNorms | None) -> tuple[Tensor, ...]:
    return placed_heads(qkv[span.tokens].unflatten(0, (span.num_rows, span.length)), shape, norms, span.rope)


def _behind(first: Tensor, second: Tensor) -> Tensor:
    """[rows, H, n, d], [rows, H, m, d] -> [rows, H, n + m, d], laid out as projections are: heads within tokens."""
    return torch.cat([first.transpose(1, 2), second.transpose(1, 2)], dim=1).transpose(1, 2)


def _spans(groups: Sequence[Group], ropes: Sequence[Tensor]) -> tuple[Span, ...]:
    spans, start = [], 0
    for group, rope in zip(groups, ropes, strict=True):
        length = len(rope)
        tokens = slice(start, start + group.num_rows * length)
        spans.append(Span(group.rows, tokens, group.num_rows, length, rope))
        start = tokens.stop
    return tuple(spans)
