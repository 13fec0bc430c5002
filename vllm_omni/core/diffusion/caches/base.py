"""The contract of a step cache: a policy for the whole stage, and the memory of one row (one branch of one sample).

A denoising step runs in three parts: the lead blocks, the rest, the tail blocks. Lead and tail are always computed;
the residual of the rest (its output minus its input) is computed or predicted from earlier steps, row by row. A row
sees itself alone, so batch-mates never change a decision. Who runs the blocks is unknown here.

Legend: L tokens of a row, D width, k numbers that a decision needs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vllm_omni.errors import CacheError, ConfigError
from vllm_omni.utils.kept import put_kept, take_kept

Signal = Literal["none", "lead_residual", "modulated_input"]


class RowCache(ABC):
    """What one row keeps from step to step. Only `update` and `note_reuse` change it, and the runner calls one of them
    once per step, after the whole step has succeeded. signal: [L, D], or None where the policy asks for none.
    """

    # all attributes that change from step to step: tensors, numbers and lists of them; empty: its state is not saved
    kept: ClassVar[tuple[str, ...]] = ()

    def state(self) -> dict[str, Any]:
        """What a row of the same policy must be given to go on from here, in this process or another. CacheError where
        that cannot be said.
        """
        if not self.kept:
            raise CacheError(f"the state of a {type(self).__name__} cannot be saved; choose another cache.policy")
        return take_kept(self, self.kept)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Makes a fresh row what another was at `state`; InvalidRequestError where that is not of such a row."""
        put_kept(self, self.kept, state)

    def measure(self, step: int, signal: Tensor | None) -> Tensor | None:
        """[k] on the device: what the decision needs of the signal. None where it needs nothing."""
        return None

    @abstractmethod
    def decides_to_reuse(self, step: int, measured: Sequence[float]) -> bool:
        """Whether `predict` serves this step. measured: the numbers of `measure`, on the host; empty for None."""

    @abstractmethod
    def predict(self, step: int) -> Tensor:
        """The residual of the rest, [L, D], replayed or extrapolated."""

    @abstractmethod
    def update(self, step: int, signal: Tensor | None, measured: Sequence[float], rest_residual: Tensor) -> None:
        """Takes in a step that was computed. The tensors are kept, not copied."""

    def note_reuse(self, step: int, signal: Tensor | None, measured: Sequence[float]) -> None:
        """Takes in a step that `predict` served."""
        return

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes of the kept tensors."""


@dataclass(frozen=True, slots=True)
class Fit:
    """What a policy's numbers were fitted on, and hold for."""

    model: str  # the fingerprint of its weights
    num_steps: int | None = None  # of the trajectories; None: they hold for any number


class StepCachePolicy(ABC):
    """One rule, with its options. Made once per stage; holds nothing of any request."""

    reference: ClassVar[str]  # where the rule and its defaults come from
    options_type: ClassVar[type]  # frozen dataclass of the policy's own YAML keys
    signal: Signal = "none"  # what `RowCache.measure` is given
    fit: Fit | None = None  # of numbers that belong to one model; None where there are none
    computes_all: ClassVar[bool] = False  # every step is computed whole: no rows are made

    num_lead_blocks: int = 0  # 0: the decision falls before any block
    num_tail_blocks: int = 0

    @abstractmethod
    def __init__(self, options: Any) -> None:
        """options: of `options_type`."""

    @abstractmethod
    def new_row(self, num_steps: int) -> RowCache:
        """The empty memory of one row. num_steps: of its trajectory."""

    @abstractmethod
    def row_bytes(self, num_tokens: int, token_bytes: int) -> int:
        """The most that the rows of a sample may ever hold. num_tokens: of all these rows together. token_bytes: of
        one token's hidden state.
        """


def check_fitted(policy: str, key: str, numbers: Sequence[float], fitted_on: str) -> None:
    """ConfigError unless there are numbers under `key` and it is said which model they were fitted on."""
    missing = key if not numbers else "fitted_on" if not fitted_on else None
    if missing is not None:
        raise ConfigError(
            f"{missing}: missing; the numbers of {policy!r} belong to one model alone,"
            f" `vllm-omni calibrate CONFIG --policy {policy}` fits them to yours"
        )


def relative_change(new: Tensor, old: Tensor) -> Tensor:
    """mean|new - old| / mean|old|, [] float32. Not finite where `old` is zero."""
    return (new - old).abs().mean(dtype=torch.float32) / old.abs().mean(dtype=torch.float32)


def tensor_bytes(*tensors: Tensor | None) -> int:
    """Bytes of all of them."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
