"""Runs a code predictor over the frames of one step: all rows at once, code after code, where there are graphs as one
launch for each bucket of rows.

Its keys and values stand in a cache of its own, a block for each row, which the next step writes over.
Legend: B frames, E width of the talker, C codes that are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from vllm_omni import registry
from vllm_omni.layers.attention.base import AttentionMetadata, AttentionUse, PagedAttention
from vllm_omni.layers.attention.choice import AUTO, choose_attention
from vllm_omni.layers.batched_draw import DrawSettings
from vllm_omni.layers.forward_context import ForwardContext
from vllm_omni.layers.table_draw import TableDraw
from vllm_omni.utils.device import Readout, StepGraphs
from vllm_omni.worker.ar.bucket_graphs import BucketGraphs, bucket_sizes
from vllm_omni.worker.ar.frames.code_predictor import CodePredictor, PredictorConfig
from vllm_omni.worker.ar.frames.frame_buffers import FrameBuffers


@dataclass(frozen=True, slots=True, eq=False)
class FrameDraw:
    """How the codes of one sequence's frames are drawn."""

    settings: DrawSettings
    generator: torch.Generator  # on the CPU, so that a seed means the same on every device


@dataclass(frozen=True, slots=True, eq=False)
class Frames:
    """What a step has written."""

    codes: list[list[int]]  # all of each frame, the first among them; -1 where logits were not finite
    rows: Tensor  # [B, E], the sums of the embeddings of all but the first


@dataclass(frozen=True, slots=True)
class _Pass:
    """One forward pass of the predictor over B rows."""

    positions: Tensor
    context: ForwardContext


class FrameWriter:
    """embedding: of the first codes. max_rows: the most frames of a step. graphs: what captures whole steps; None: they
    are launched operation by operation.
    """

    def __init__(
        self,
        predictor: CodePredictor,
        embedding: nn.Embedding,
        max_rows: int,
        device: torch.device,
        dtype: torch.dtype,
        graphs: StepGraphs | None = None,
    ) -> None:
        config = predictor.config
        self._predictor, self._embedding = predictor, embedding
        self._device = device
        self._block_size = config.num_codes + 1  # a state, and all codes of the frame but the last
        use = AttentionUse(device, dtype, self._block_size, config.head_dim)
        self._attention: type[PagedAttention] = registry.resolve("attention", choose_attention(AUTO, use))
        shape = (config.num_layers, 2, max_rows, self._block_size, config.num_kv_heads, config.head_dim)
        self._cache = torch.zeros(shape, device=device, dtype=dtype)
        self._passes: dict[int, list[_Pass]] = {}
        self._buffers = FrameBuffers(
            max_rows, config.num_codes, config.vocab_size, config.embedding_size, device, dtype
        )
        self._graphs = None if graphs is None else self._capture(graphs, max_rows)

    @torch.inference_mode()
    def write(self, states: Tensor, first_codes: Sequence[int], draws: Sequence[FrameDraw]) -> Frames:
        """states: [B, E], the talker's."""
        buffers, count, num_codes = self._buffers, len(first_codes), self._predictor.config.num_codes
        settings = [draw.settings for draw in draws]
        buffers.fill(states, first_codes, [_uniforms(draw, num_codes) for draw in draws], settings)
        if self._graphs is not None:
            self._graphs.replay(count)
        else:
            self._step(count, settings)
        written = Readout(buffers.codes[:count].flatten())
        rows = buffers.rows[:count].clone()  # which the next step writes over
        codes = written.tolist()
        others = [codes[start : start + num_codes] for start in range(0, len(codes), num_codes)]
        return Frames([[first, *other] for first, other in zip(first_codes, others, strict=True)], rows)

    @torch.inference_mode()
    def _capture(self, graphs: StepGraphs, max_rows: int) -> BucketGraphs:
        sizes = sorted({min(size, max_rows) for size in bucket_sizes(max_rows)})
        for size in sizes:
            self._plan(size)  # numbers of the host, which no graph can hold
        return BucketGraphs(graphs, sizes, lambda size: partial(self._step, size))

    def _step(self, num_rows: int, settings: Sequence[DrawSettings] | None = None) -> None:
        """All codes of the first rows of the buffers: what is captured. settings: those that stand there; None:
        whichever do by then.
        """
        predictor, buffers = self._predictor, self._buffers
        uniforms = buffers.uniforms(num_rows)
        draw = TableDraw(buffers.settings(num_rows), predictor.config.vocab_size, settings)
        first, *later = self._plan(num_rows)
        begin = torch.stack((buffers.states[:num_rows], self._embedding(buffers.first_codes(num_rows))), 1)
        hidden = predictor(begin.flatten(0, 1), first.positions, first.context)
        logits = predictor.lm_head[0](hidden[1::2])
        codes = [draw.draw(logits, uniforms[0])]
        for codebook, its in enumerate(later, 1):
            rows = predictor.embed(codes[-1], codebook - 1)
            logits = predictor.lm_head[codebook](predictor(rows, its.positions, its.context))
            codes.append(draw.draw(logits, uniforms[codebook]))
        is_sound = logits.isfinite().all(-1, keepdim=True)  # what was not, before, has spoilt these too
        written = buffers.codes[:num_rows]
        written.copy_(torch.stack(codes, 1).masked_fill(~is_sound, -1))
        buffers.rows[:num_rows].copy_(predictor.summed_rows(written.clamp_min(0)))

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
