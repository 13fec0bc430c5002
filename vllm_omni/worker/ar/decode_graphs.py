"""Whole decode steps, logits and greedy tokens included, captured in graphs: one for each bucket of a DecodeBatch.
Knows no scheduler and no sampling parameters.

Legend: N rows of a bucket, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from functools import partial

import torch

from vllm_omni.layers.attention.base import PagedAttention
from vllm_omni.layers.sampler import largest
from vllm_omni.utils.device import StepGraphs, is_cuda
from vllm_omni.worker.ar.batch import DecodeBatch, StepBatch
from vllm_omni.worker.ar.language_model import LanguageModelFolder
from vllm_omni.worker.ar.step_logits import StepLogits

SMALL_BUCKETS = (1, 2, 4, 8)
BUCKET_STEP = 16
COARSE_FROM, COARSE_STEP = 256, 128  # many rows cost so much each that padding by a few is cheap


class DecodeGraphs:
    """The graphs of one model, captured when they are made, the largest first: the others fit into its memory."""

    def __init__(
        self,
        graphs: StepGraphs,
        batch: DecodeBatch,
        compute: Callable[[StepBatch], StepLogits],
        *,
        sizes: Many[int],
        vocab_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """compute: of a batch, the logits [N, V] of all rows. sizes: the batch's buckets, ascending."""
        self._logits = torch.empty(sizes[-1], vocab_size, device=device, dtype=dtype)
        self.chosen = torch.zeros(
            sizes[-1], device=device, dtype=torch.int64
        )  # by the last step, by its rows: largest logits, and what was drawn
        # compute is the runner's, which holds these graphs: kept here it would keep the KV pool alive as well
        self._replay = {
            size: graphs.capture(partial(self._step, compute, batch.padding(size))) for size in reversed(sizes)
        }

    def run(self, batch: StepBatch) -> StepLogits:
        """The step of a batch that stands in the buffers of the DecodeBatch, without inputs beyond ids."""
        self._replay[len(batch.token_ids)]()
        rows = batch.sampling_rows
        if batch.samples_first_rows:
            return StepLogits(self._logits[: len(rows)], self.chosen[: len(rows)])
        return StepLogits(self._logits[rows], self.chosen[rows])

    def _step(self, compute: Callable[[StepBatch], StepLogits], batch: StepBatch) -> None:
        """Everything that is captured."""
        logits = compute(batch).logits
        assert logits is not None
        self._logits[: len(logits)].copy_(logits)
        self.chosen[: len(logits)].copy_(largest(logits))


def bucket_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Numbers of rows, ascending, the last at least max_num_seqs."""
    sizes = list(SMALL_BUCKETS)
    while sizes[-1] < max_num_seqs:
        step = BUCKET_STEP if sizes[-1] < COARSE_FROM else COARSE_STEP
        sizes.append((sizes[-1] // step + 1) * step)
    return tuple(size for index, size in enumerate(sizes) if index == 0 or sizes[index - 1] < max_num_seqs)


def capture_complaint(
    model: LanguageModelFolder, attention: type[PagedAttention], *, can_write: bool, device: torch.device
) -> str | None:
    """Why the decode steps of a stage cannot be captured; None where they can."""
    if not is_cuda(device):
        return f"got device {device.type}, expected cuda"
    if not can_write:
        return "the stage writes nothing"
    if not model.model_class.is_capturable:
        return f"{model.name} plans each step by its tokens"
    if model.config.scaled_beyond is not None:
        return "the positions of this model depend on the length of its sequences"
    if not attention.is_capturable:
        return "this attention backend plans each step by its lengths; expected attention: triton or flash"
    return None
