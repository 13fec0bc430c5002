"""Computes every step and notes what the calibrated policies need to know of a model. For `vllm-omni calibrate`, which
reads `records` when all requests are done; serves nobody faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vllm_omni.core.diffusion.caches.base import RowCache, StepCachePolicy, relative_change, tensor_bytes

EPSILON = 1e-8  # added to the length of a token's residual before it divides


@dataclass(frozen=True, slots=True)
class RecordingOptions:
    """The keys beside `policy: recording`."""

    signal: Literal["none", "modulated_input"] = "none"  # whether the first block's modulated input is noted too


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One row's step against the row's step before."""

    step: int
    input_change: float | None  # relative change of the modulated input
    residual_change: float  # relative change of the residual of all blocks
    magnitude_ratio: float  # length of a token's residual over its length before, mean of all tokens


class Recording(StepCachePolicy):
    """Unlike every other policy it keeps something beyond a request: numbers, which nobody else reads."""

    reference = "what arXiv 2411.19108 and 2506.09045 fit"
    options_type = RecordingOptions

    def __init__(self, options: RecordingOptions) -> None:
        self.signal = options.signal
        self.records: list[StepRecord] = []

    def new_row(self, num_steps: int) -> RecordingRow:
        return RecordingRow(self.records)

    def row_bytes(self, num_tokens: int, token_bytes: int) -> int:
        return (1 if self.signal == "none" else 2) * num_tokens * token_bytes


class RecordingRow(RowCache):
    """The last step's modulated input and residual."""

    def __init__(self, records: list[StepRecord]) -> None:
        self._records = records
        self._input: Tensor | None = None
        self._rest: Tensor | None = None

    def decides_to_reuse(self, step: int, measured: Sequence[float]) -> bool:
        return False

    def predict(self, step: int) -> Tensor:
        raise AssertionError("every step is computed")

    def update(self, step: int, signal: Tensor | None, measured: Sequence[float], rest_residual: Tensor) -> None:
        if self._rest is not None:
            change = None
            if signal is not None and self._input is not None:
                change = float(relative_change(signal, self._input))
            residual_change = float(relative_change(rest_residual, self._rest))
            self._records.append(StepRecord(step, change, residual_change, self._magnitude_ratio(rest_residual)))
        self._input, self._rest = signal, rest_residual

    @property
    def num_bytes(self) -> int:
        return tensor_bytes(self._input, self._rest)

    def _magnitude_ratio(self, residual: Tensor) -> float:
        assert self._rest is not None
        new, old = (torch.linalg.vector_norm(rest.float(), dim=-1) for rest in (residual, self._rest))
        return float((new / (old + EPSILON)).mean())
