"""Whole decode steps, logits and greedy tokens included, captured in graphs: one for each bucket of a DecodeBatch.
Knows no scheduler and no sampling parameters.

Legend: N rows of a bucket, V vocabulary, D hidden size.
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
from vllm_omni.worker.ar.bucket_graphs import BucketGraphs
from vllm_omni.worker.ar.language_model import LanguageModelFolder
from vllm_omni.worker.ar.step_logits import StepLogits


class DecodeGraphs:
    """The graphs of one model."""

    def __init__(
        self,
        graphs: StepGraphs,
        batch: DecodeBatch,
        compute: Callable[[StepBatch], StepLogits],
        *,
        sizes: Many[int],
        vocab_size: int,
        state_size: int | None = None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """compute: of a batch, the logits [N, V] of all rows. sizes: the batch's buckets, ascending. state_size: where
        the states [N, D] are wanted, too, their D.
        """
        self._logits = torch.empty(sizes[-1], vocab_size, device=device, dtype=dtype)
        # by the last step, by its rows: largest logits, and what was drawn
        self.chosen = torch.zeros(sizes[-1], device=device, dtype=torch.int64)
        self._states = None
        if state_size is not None:
            self._states = torch.empty(sizes[-1], state_size, device=device, dtype=dtype)
        # compute is the runner's, which holds these graphs: kept here it would keep the KV pool alive as well
        self._graphs = BucketGraphs(graphs, sizes, lambda size: partial(self._step, compute, batch.padding(size)))

    def run(self, batch: StepBatch) -> StepLogits:
        """The step of a batch that stands in the buffers of the DecodeBatch."""
        self._graphs.replay(len(batch.token_ids))
        rows = slice(len(batch.sampling_rows)) if batch.samples_first_rows else batch.sampling_rows
        states = None if self._states is None else self._states[rows]
        return StepLogits(self._logits[rows], self.chosen[rows], states=states)

    def _step(self, compute: Callable[[StepBatch], StepLogits], batch: StepBatch) -> None:
        """Everything that is captured."""
        computed = compute(batch)
        logits, states = computed.logits, computed.states
        assert logits is not None
        if self._states is not None and states is not None:
            self._states[: len(states)].copy_(states)
        self._logits[: len(logits)].copy_(logits)
        self.chosen[: len(logits)].copy_(largest(logits))


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
