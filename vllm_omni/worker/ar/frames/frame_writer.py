"""Runs a code predictor over the frames of one step: all rows at once, code after code.

Its keys and values stand in a cache of its own, a block for each row, which the next step writes over.
Legend: B frames, E width of the talker, C codes that are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_omni import registry
from vllm_omni.layers.attention.base import AttentionMetadata, AttentionUse, PagedAttention
from vllm_omni.layers.attention.choice import AUTO, choose_attention
from vllm_omni.layers.batched_draw import BatchedDraw, DrawSettings
from vllm_omni.layers.forward_context import ForwardContext
from vllm_omni.worker.ar.frames.code_predictor import CodePredictor, PredictorConfig


@dataclass(frozen=True, slots=True, eq=False)
class FrameDraw:
    """How the codes of one sequence's frames are drawn."""

    settings: DrawSettings
    generator: torch.Generator  # on the CPU, so that a seed means the same on every device


@dataclass(frozen=True, slots=True)
class _Pass:
    """One forward pass of the predictor over B rows."""

    positions: Tensor
    context: ForwardContext


class FrameWriter:
    """max_rows: the most frames of a step."""

    def __init__(self, predictor: CodePredictor, max_rows: int, device: torch.device, dtype: torch.dtype) -> None:
        config = predictor.config
        self._predictor = predictor
        self._device = device
        self._block_size = config.num_codes + 1  # a state, and all codes of the frame but the last
        use = AttentionUse(device, dtype, self._block_size, config.head_dim)
        self._attention: type[PagedAttention] = registry.resolve("attention", choose_attention(AUTO, use))
        shape = (config.num_layers, 2, max_rows, self._block_size, config.num_kv_heads, config.head_dim)
        self._cache = torch.zeros(shape, device=device, dtype=dtype)
        self._passes: dict[int, list[_Pass]] = {}

    @torch.inference_mode()
    def write(self, states: Tensor, first_rows: Tensor, draws: Sequence[FrameDraw]) -> Tensor:
        """states: [B, E], the talker's; first_rows: [B, E], embeddings of the first codes -> [B, C] int64, -1 in the
        rows whose logits were not finite.
        """
        config = self._predictor.config
        vocab_size, num_codes = config.vocab_size, config.num_codes
        uniforms = torch.stack([_uniforms(draw, num_codes) for draw in draws], dim=1).to(self._device)
        draw = BatchedDraw([draw.settings for draw in draws], vocab_size, self._device)
        first, *later = self._plan(len(states))
        hidden = self._predictor(torch.stack((states, first_rows), 1).flatten(0, 1), first.positions, first.context)
        logits = self._predictor.lm_head[0](hidden[1::2])
        codes = [draw.draw(logits, uniforms[0])]
        for codebook, its in enumerate(later, 1):
            rows = self._predictor.embed(codes[-1], codebook - 1)
            logits = self._predictor.lm_head[codebook](self._predictor(rows, its.positions, its.context))
            codes.append(draw.draw(logits, uniforms[codebook]))
        is_sound = logits.isfinite().all(-1, keepdim=True)  # what was not, before, has spoilt these too
        return torch.stack(codes, 1).masked_fill(~is_sound, -1)

    def _plan(self, num_rows: int) -> list[_Pass]:
        """The passes of a step, made once for each number of rows."""
        if num_rows not in self._passes:
            lengths = range(2, self._block_size + 1)
            self._passes[num_rows] = [
                self._pass(num_rows, 0 if length == 2 else length - 1, length) for length in lengths
            ]
        return self._passes[num_rows]

    def _pass(self, num_rows: int, start: int, stop: int) -> _Pass:
        """Positions [start, stop) of every row."""
        size = self._block_size
        metadata = AttentionMetadata.of(
            slots=[row * size + place for row in range(num_rows) for place in range(start, stop)],
            query_starts=range(0, num_rows * (stop - start) + 1, stop - start),
            context_lens=[stop] * num_rows,
            block_tables=[[row] for row in range(num_rows)],
            block_size=size,
            device=self._device,
        )
        positions = torch.arange(start, stop, device=self._device).repeat(num_rows)
        context = ForwardContext(self._attention(metadata), self._cache, self._predictor.config.num_layers)
        return _Pass(positions, context)


def cache_bytes(config: PredictorConfig, max_rows: int, itemsize: int) -> int:
    """What a writer holds for so many rows."""
    values = config.num_layers * 2 * (config.num_codes + 1) * config.num_kv_heads * config.head_dim
    return values * max_rows * itemsize


def _uniforms(draw: FrameDraw, count: int) -> Tensor:
    """[count] float64; zeros where nothing is drawn."""
    if draw.settings.temperature == 0:
        return torch.zeros(count, dtype=torch.float64)
    return torch.rand(count, generator=draw.generator, dtype=torch.float64)
