"""What a step of a language model gives the sampler. Knows no model.

Legend: R tokens whose logits are sampled, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from vllm_omni.errors import StageError
from vllm_omni.layers.sampler import SampledToken, SamplingRow, sample
from vllm_omni.utils.device import Readout


@dataclass(frozen=True, slots=True)
class ChosenTokens:
    """The token of the largest logit of each row that samples; -1 where a row is not finite."""

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
class StepLogits:
    """Logits, good until the next step, and where the step has chosen already, the greedy tokens."""

    logits: Tensor | None  # [R, V], the model's dtype; None where all rows are known to be greedy
    greedy: ChosenTokens | None = None
    states: Tensor | None = None  # [R, D], what the logits were made of; None of a captured step that keeps none

    def sample(
        self, rows: Sequence[SamplingRow], drafts: Sequence[Sequence[int]] | None = None
    ) -> list[list[SampledToken | StageError]]:
        """As `layers.sampler.sample`; what the step has chosen comes from the device in one transfer."""
        if self.greedy is None:
            assert self.logits is not None
            return sample(self.logits, rows, drafts)
        lengths = [1 + len(draft) for draft in drafts] if drafts else [1] * len(rows)
        starts = [0, *accumulate(lengths)]
        left = [
            place
            for row, start, stop in zip(rows, starts, starts[1:], strict=False)
            if not row.is_plain_greedy
            for place in range(start, stop)
        ]
        logits = {}
        if left:
            assert self.logits is not None
            logits = dict(zip(left, self.logits[left].cpu(), strict=True))  # where they are drawn anyway
        return sample(logits, rows, drafts, self.greedy.tolist())
