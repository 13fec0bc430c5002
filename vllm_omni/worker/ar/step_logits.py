"""What a step of a language model gives the sampler. Knows no model.

Legend: R rows that sample, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vllm_omni.errors import StageError
from vllm_omni.layers.sampler import SampledToken, SamplingRow, sample


@dataclass(frozen=True, slots=True)
class StepLogits:
    """Logits, and where the step has chosen already, the greedy tokens: good until the next step."""

    logits: Tensor  # [R, V], the model's dtype
    greedy: Tensor | None = None  # [R] int64, the token of the largest logit; -1 where a row is not finite

    def sample(self, rows: Sequence[SamplingRow]) -> list[SampledToken | StageError]:
        """As `layers.sampler.sample`; what the step has chosen comes from the device in one transfer."""
        if self.greedy is None:
            return sample(self.logits, rows)
        chosen = self.greedy.tolist()
        tokens: list[SampledToken | StageError] = [SampledToken(token) for token in chosen]
        left = [index for index, row in enumerate(rows) if chosen[index] < 0 or not row.is_plain_greedy]
        if left:
            sampled = sample(self.logits[left].cpu(), [rows[index] for index in left])  # where they are drawn anyway
            for index, token in zip(left, sampled, strict=True):
                tokens[index] = token
        return tokens
