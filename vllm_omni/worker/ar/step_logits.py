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


@dataclass(frozen=True, slots=True)
class StepLogits:
    """Logits, and where the step has chosen already, the greedy tokens: good until the next step."""

    logits: Tensor  # [R, V], the model's dtype
    states: Tensor | None = None  # [R, D], what the logits were made of; None of a step that keeps none
    greedy: Tensor | None = None  # [R] int64, the token of the largest logit; -1 where a row is not finite

    def sample(
        self, rows: Sequence[SamplingRow], drafts: Sequence[Sequence[int]] | None = None
    ) -> list[list[SampledToken | StageError]]:
        """As `layers.sampler.sample`; what the step has chosen comes from the device in one transfer."""
        if self.greedy is None:
            return sample(self.logits, rows, drafts)
        lengths = [1 + len(draft) for draft in drafts] if drafts else [1] * len(rows)
        starts = [0, *accumulate(lengths)]
        left = [
            place
            for row, start, stop in zip(rows, starts, starts[1:], strict=False)
            if not row.is_plain_greedy
            for place in range(start, stop)
        ]
        logits = dict(zip(left, self.logits[left].cpu(), strict=True)) if left else {}  # where they are drawn anyway
        return sample(logits, rows, drafts, self.greedy.tolist())
