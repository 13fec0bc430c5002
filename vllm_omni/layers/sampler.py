"""From logits to tokens, row by row: every parameter acts on its own row, every row draws from its own generator.

A row's token is a function of its logits, its parameters and its earlier draws alone, never of its batch-mates. Draws
come from the CPU, so that a seed means the same on every device.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_omni.errors import StageError
from vllm_omni.layers.native.vocabulary import find_largest
from vllm_omni.params import SamplingParams, sample_seed


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A token; with log probabilities when asked for: the chosen token's first, then the best of the row, most likely
    first.
    """

    token_id: int
    logprobs: Mapping[int, float] | None = None


class SamplingRow:
    """How one sequence samples, and what it has sampled so far (which `sample` records).

    sample_index: which of the request's n samples this is; a seeded one draws from `seed + sample_index`.
    stop_token_ids: what must not be written before `min_tokens` tokens are, end-of-sequence ids included.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Iterable[int],
        stop_token_ids: Iterable[int],
        sample_index: int = 0,
    ) -> None:
        self.temperature = 1.0 if params.temperature is None else params.temperature
        self.top_k = params.top_k or 0
        self.top_p = 1.0 if params.top_p is None else params.top_p
        self.min_p = params.min_p or 0.0
        self.repetition_penalty = 1.0 if params.repetition_penalty is None else params.repetition_penalty
        self.presence_penalty = params.presence_penalty or 0.0
        self.frequency_penalty = params.frequency_penalty or 0.0
        self.min_tokens = params.min_tokens or 0
        self.num_logprobs = params.logprobs
        self._bias = dict(params.logit_bias or {})
        self._stop_token_ids = sorted(set(stop_token_ids))
        shapes = self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty
        self._takes_largest = self.temperature == 0 and not shapes and self.num_logprobs is None
        self._written: Counter[int] = Counter()
        self._seen = set(prompt_token_ids) if self.repetition_penalty != 1.0 else set()
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sample_seed(params.seed, sample_index))

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the next token is the largest raw logit, and nothing else is asked for."""
        return self._takes_largest and not self._bias and not self._suppresses_stops

    @property
    def _suppresses_stops(self) -> bool:
        return self._written.total() < self.min_tokens if self.min_tokens else False

    def sample(self, logits: Tensor) -> SampledToken:
        """logits: [V] float32, of this row alone and free to be written into."""
        log_probabilities = logits.log_softmax(-1) if self.num_logprobs is not None else None
        self._shape(logits)
        if not logits.max().isfinite():
            raise StageError(
                "sampling: penalties, logit_bias and min_tokens leave no token with a finite logit; relax them"
            )
        token = int(logits.argmax()) if self.temperature == 0 else self._draw(logits)
        return SampledToken(token, None if log_probabilities is None else self._best(log_probabilities, token))

    def record(self, token_id: int) -> None:
        """Notes a token that it has sampled, for the penalties and `min_tokens`."""
        self._written[token_id] += 1
        self._seen.add(token_id)

    def _shape(self, logits: Tensor) -> None:
        """Penalties, then biases, then what must not be written yet; all on raw logits."""
        if self.repetition_penalty != 1.0 and self._seen:
            seen = torch.tensor(sorted(self._seen), device=logits.device)
            values = logits[seen]
            logits[seen] = torch.where(values > 0, values / self.repetition_penalty, values * self.repetition_penalty)
        if (self.presence_penalty or self.frequency_penalty) and self._written:
            written = torch.tensor(list(self._written), device=logits.device)
            counts = torch.tensor(list(self._written.values()), device=logits.device, dtype=logits.dtype)
            logits[written] -= self.presence_penalty + self.frequency_penalty * counts
        if self._bias:
            biased = torch.tensor(list(self._bias), device=logits.device)
            logits[biased] += torch.tensor(list(self._bias.values()), device=logits.device, dtype=logits.dtype)
        if self._suppresses_stops and self._stop_token_ids:
            logits[torch.tensor(self._stop_token_ids, device=logits.device)] = -math.inf

    def _draw(self, logits: Tensor) -> int:
        logits = logits.cpu()
        tokens: Tensor | None = None
        if self.top_k:  # what is not among them has no part in anything that follows
            logits, tokens = logits.topk(min(self.top_k, len(logits)))
        logits = logits.double()
        probabilities = ((logits - logits.max()) / self.temperature).softmax(-1)
        if self.top_p < 1:  # the fewest that reach top_p together; always the most likely one
            if tokens is None:
                probabilities, tokens = probabilities.sort(descending=True, stable=True)
            before = probabilities.cumsum(0) - probabilities
            probabilities[before >= self.top_p * probabilities.sum()] = 0
        if self.min_p:
            probabilities[probabilities < self.min_p * probabilities.max()] = 0
        cumulated = probabilities.cumsum(0)
        threshold = torch.rand((), generator=self._generator, dtype=torch.float64) * cumulated[-1]
        drawn = int(torch.searchsorted(cumulated, threshold, right=True))
        drawn = min(drawn, int(probabilities.nonzero()[-1]))  # rounding may carry the threshold to the very end
        return drawn if tokens is None else int(tokens[drawn])

    def _best(self, log_probabilities: Tensor, token: int) -> dict[int, float]:
        found = {token: float(log_probabilities[token])}
        values, tokens = log_probabilities.topk(min(self.num_logprobs or 0, len(log_probabilities)))
        for other, value in zip(tokens.tolist(), values.tolist(), strict=True):
            found.setdefault(other, value)
        return found


def sample(
    logits: Tensor | Mapping[int, Tensor],
    rows: Sequence[SamplingRow],
    drafts: Sequence[Sequence[int]] | None = None,
    greedy: Sequence[int] | None = None,
) -> list[list[SampledToken | StageError]]:
    """For each row its tokens: one, and where it has a draft one more behind each token of that which it has sampled,
    too. A row that cannot be sampled ends with its own error, and gives no other's.

    logits: [R, V], of each row and then of each token of its draft; only those that `greedy` does not answer for need
    be there. greedy: of each of the R its largest, as `largest` says. So a row has the same tokens, and draws as often,
    as if each of them had been sampled in a step of its own.
    """
    if greedy is None:
        assert isinstance(logits, Tensor)
        greedy = largest(logits)
    sampled: list[list[SampledToken | StageError]] = []
    first = 0
    for index, row in enumerate(rows):
        draft = drafts[index] if drafts else ()
        tokens: list[SampledToken | StageError] = []
        for place, expected in enumerate((*draft, None), first):
            token = _sample_one(logits, place, greedy[place], row)
            tokens.append(token)
            if isinstance(token, StageError):
                break
            row.record(token.token_id)
            if token.token_id != expected:
                break
        sampled.append(tokens)
        first += len(draft) + 1
    return sampled


def _sample_one(
    logits: Tensor | Mapping[int, Tensor], place: int, greedy: int, row: SamplingRow
) -> SampledToken | StageError:
    if greedy < 0:
        return StageError("logits: got NaN or infinity, expected finite numbers; try dtype float32")
    if row.is_plain_greedy:
        return SampledToken(greedy)
    try:
        return row.sample(logits[place].to(torch.float32, copy=True))
    except StageError as error:
        return error


def largest(logits: Tensor) -> list[int]:
    """logits: [R, V] -> the first of the largest of each row, or -1 for a row that is not all finite."""
    found = find_largest(logits)
    if found is not None:
        return found
    is_finite = logits.isfinite().all(-1)
    return torch.where(is_finite, logits.argmax(-1), -1).tolist()
