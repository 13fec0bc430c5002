"""DBCache: the first blocks decide, as the first one does in the first-block cache; the last blocks are always
computed, so that they mend what the replayed ones in between leave out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vllm_omni.core.diffusion.caches.base import StepCachePolicy
from vllm_omni.core.diffusion.caches.first_block import FirstBlockRow
from vllm_omni.errors import ConfigError
from vllm_omni.utils.checks import check_number


@dataclass(frozen=True, slots=True)
class DBCacheOptions:
    """The keys beside `policy: dbcache`."""

    lead_blocks: int = 4  # at the beginning, computed at every step; their residual decides
    tail_blocks: int = 0  # at the end, computed at every step
    threshold: float = 0.08  # the largest relative change of the lead blocks' residual that is taken for none
    max_skips: int | None = None  # the most steps in a row that are replayed; null: as many as there are

    def __post_init__(self) -> None:
        check_number("lead_blocks", self.lead_blocks, 1, integer=True, raises=ConfigError)
        check_number("tail_blocks", self.tail_blocks, 0, integer=True, raises=ConfigError)
        check_number("threshold", self.threshold, 0, raises=ConfigError)
        if self.max_skips is not None:
            check_number("max_skips", self.max_skips, 0, integer=True, raises=ConfigError)


class DBCache(StepCachePolicy):
    """Replays the blocks between lead and tail when mean|r - r_last| / mean|r_last| of the lead blocks' residual r is
    at most the threshold; r_last is of the last computed step. With one lead block and no tail it is `first_block`.
    """

    reference = "cache-dit's DBCache (8 lead blocks of 57 and 0.08 there; here the same share of 30)"
    options_type = DBCacheOptions
    signal = "lead_residual"

    def __init__(self, options: DBCacheOptions) -> None:
        self._options = options
        self.num_lead_blocks = options.lead_blocks
        self.num_tail_blocks = options.tail_blocks

    def new_row(self, num_steps: int) -> DBCacheRow:
        return DBCacheRow(self._options)

    def row_bytes(self, num_tokens: int, token_bytes: int) -> int:
        return 2 * num_tokens * token_bytes  # both residuals


class DBCacheRow(FirstBlockRow):
    """Also counts the steps that were replayed since the last computed one."""

    kept = (*FirstBlockRow.kept, "_num_skips")

    def __init__(self, options: DBCacheOptions) -> None:
        super().__init__(options.threshold)
        self._max_skips = options.max_skips
        self._num_skips = 0

    def decides_to_reuse(self, step: int, measured: Sequence[float]) -> bool:
        has_turn = self._max_skips is None or self._num_skips < self._max_skips
        return has_turn and super().decides_to_reuse(step, measured)

    def update(self, step: int, signal: Tensor | None, measured: Sequence[float], rest_residual: Tensor) -> None:
        super().update(step, signal, measured, rest_residual)
        self._num_skips = 0

    def note_reuse(self, step: int, signal: Tensor | None, measured: Sequence[float]) -> None:
        self._num_skips += 1
