"""What a step of a language model gives the sampler. Knows no model.

Legend: R tokens whose logits are sampled, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from vllm_omni.errors import StageError
from vllm_omni.layers.sampler import SampledToken, Sampler, SamplingRow, largest, sample
from vllm_omni.utils.device import Readout


@dataclass(frozen=True, slots=True)
class ChosenTokens:
    """The tokens of the rows that sample, on their way from the device; -1 where a row is not finite."""

    readout: Readout
    rows: Sequence[int] | None = None  # which of those that are read; None: all

    def of_rows(self, rows: Sequence[int]) -> ChosenTokens:
        """Those of some rows, in this order."""
        return ChosenTokens(self.readout, rows)

    def tolist(self) -> list[int]:
        """Waits for the step."""
        tokens = self.readout.tolist()
        return tokens if self.rows is None else [tokens[row] for row in self.rows]


@dataclass(frozen=True, slots=True)
class Choice:
    """Tokens of a step that are chosen where they can be, and not looked at yet."""

    chosen: ChosenTokens
    rows: Sequence[SamplingRow]
    drafts: Sequence[Sequence[int]]
    logits: Tensor | None  # as of StepLogits

    def sample(self) -> list[list[SampledToken | StageError]]:
        """As `layers.sampler.sample`; tokens come from the device in one transfer, and in another the logits of rows
        that are not plain.
        """
        places = self._places_of_others()
        logits = {}
        if places:
            assert self.logits is not None
            logits = dict(zip(places, self.logits[places].cpu(), strict=True))
        return sample(logits, self.rows, self.drafts, self.chosen.tolist())

    def _places_of_others(self) -> list[int]:
        """Among the logits, those of rows that are not plain."""
        if not any(self.drafts):
            return [place for place, row in enumerate(self.rows) if not row.is_plain]
        starts = accumulate((1 + len(draft) for draft in self.drafts), initial=0)
        found = zip(starts, self.rows, self.drafts, strict=False)
        return [
            place for start, row, draft in found if not row.is_plain for place in range(start, start + 1 + len(draft))
        ]


@dataclass(frozen=True, slots=True)
class StepLogits:
    """Logits, good until the next step, and what the step has found in them already."""

    logits: Tensor | None  # [R, V], the model's dtype; None where all tokens are chosen
    largest: Tensor | None = None  # [R] int64, as `layers.sampler.largest`; what is drawn is written over it
    chosen: ChosenTokens | None = None
    states: Tensor | None = None  # [R, D], what the logits were made of; None of a captured step that keeps none

    @torch.inference_mode()
    def choose(
        self,
        sampler: Sampler,
        rows: Sequence[SamplingRow],
        drafts: Sequence[Sequence[int]] = (),
        *,
        tokens_ahead: int = 0,
    ) -> Choice:
        """Begins to choose the tokens of these rows, where the logits are. tokens_ahead: how many tokens of each row
        are on their way and not recorded.
        """
        if self.chosen is not None:
            return Choice(self.chosen, rows, drafts, None)
        assert self.logits is not None
        places: Sequence[int] = [0] * len(rows)
        spread = rows
        if any(drafts):
            places = [place for draft in drafts for place in range(1 + len(draft))]
            spread = [row for row, draft in zip(rows, drafts, strict=True) for _ in range(1 + len(draft))]
        tokens = largest(self.logits) if self.largest is None else self.largest
        sampler.choose(self.logits, tokens, spread, places, tokens_ahead)
        return Choice(ChosenTokens(Readout(tokens)), rows, drafts, self.logits)
