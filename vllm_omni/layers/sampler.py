"""From logits to tokens: every parameter acts on its own row, every row draws from its own generator.

A row's token is a function of its logits, its parameters and its earlier draws alone, never of its batch-mates. The
numbers that are drawn come from the CPU, so that a seed means the same on every device; what they choose is computed
where the logits are, of all plain rows at once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_omni.errors import StageError
from vllm_omni.layers.batched_draw import GREEDY, BatchedDraw, DrawSettings
from vllm_omni.layers.native.vocabulary import find_largest
from vllm_omni.params import SamplingParams, sample_seed
from vllm_omni.utils.device import to_device

NUMBERS_AT_ONCE = 32  # that a row draws from its generator


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
        self.settings = DrawSettings(
            1.0 if params.temperature is None else params.temperature,
            params.top_k or 0,
            1.0 if params.top_p is None else params.top_p,
            params.min_p or 0.0,
        )
        self.repetition_penalty = 1.0 if params.repetition_penalty is None else params.repetition_penalty
        self.presence_penalty = params.presence_penalty or 0.0
        self.frequency_penalty = params.frequency_penalty or 0.0
        self.min_tokens = params.min_tokens or 0
        self.num_logprobs = params.logprobs
        self._bias = dict(params.logit_bias or {})
        self._stop_token_ids = sorted(set(stop_token_ids))
        shapes = self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty
        self._is_never_plain = bool(shapes or self._bias or self.num_logprobs is not None)
        self._counts_written = bool(shapes or self.min_tokens)
        self._written: Counter[int] = Counter()
        self._seen = set(prompt_token_ids) if self.repetition_penalty != 1.0 else set()
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sample_seed(params.seed, sample_index))
        self._numbers: list[float] = []  # drawn, from the next one on
        self.draws = self.settings.temperature > 0  # whether its tokens need numbers
        # whether the next token follows from its raw logits, the settings and a number, and nothing else is asked for;
        # once it does, all that follow do
        self.is_plain = not (self._is_never_plain or self._suppresses_stops)

    def number(self, ahead: int = 0) -> float:
        """In [0, 1): what the next token is drawn with, or that which comes so many tokens behind it; 0 where none is
        needed.
        """
        if not self.draws:
            return 0.0
        while len(self._numbers) <= ahead:
            self._numbers += torch.rand(NUMBERS_AT_ONCE, generator=self._generator, dtype=torch.float64).tolist()
        return self._numbers[ahead]

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
        token = self._draw(logits) if self.draws else int(logits.argmax())
        return SampledToken(token, None if log_probabilities is None else self._best(log_probabilities, token))

    def record(self, token_id: int) -> None:
        """Notes a token that it has sampled: for the penalties and `min_tokens`, and its number is spent."""
        if self._counts_written:
            self._written[token_id] += 1
            self._seen.add(token_id)
            self.is_plain = not (self._is_never_plain or self._suppresses_stops)
        if self.draws:
            self.number()
            del self._numbers[0]

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
        number = torch.tensor([self.number()], dtype=torch.float64)
        return int(BatchedDraw([self.settings], len(logits), logits.device).draw(logits[None], number))

    def _best(self, log_probabilities: Tensor, token: int) -> dict[int, float]:
        found = {token: float(log_probabilities[token])}
        values, tokens = log_probabilities.topk(min(self.num_logprobs or 0, len(log_probabilities)))
        for other, value in zip(tokens.tolist(), values.tolist(), strict=True):
            found.setdefault(other, value)
        return found


class Sampler:
    """Chooses the tokens of plain rows where their logits are. Keeps the settings there while the rows stay the same:
    those of a step are mostly those of the step before.
    """

    def __init__(self) -> None:
        self._settings: list[DrawSettings] = []
        self._draw: BatchedDraw | None = None

    def choose(
        self, logits: Tensor, chosen: Tensor, rows: Sequence[SamplingRow], places: Sequence[int], tokens_ahead: int = 0
    ) -> None:
        """logits: [R, V]. chosen: [R] int64, of each the largest one, or -1 of one that is not finite; the tokens of
        plain rows that draw are written over it. rows, places: of each its row, and which it is of the tokens that the
        row is to sample. tokens_ahead: how many tokens of each row are on their way before these.
        """
        settings = [row.settings if row.is_plain else GREEDY for row in rows]
        if self._draw is None or settings != self._settings:
            self._draw, self._settings = BatchedDraw(settings, logits.shape[-1], logits.device), settings
        if not self._draw.draws:
            return
        numbers = [row.number(place + tokens_ahead) for row, place in zip(rows, places, strict=True)]
        drawn = self._draw.draw(logits, to_device(numbers, torch.float64, logits.device), chosen)
        torch.where(chosen < 0, chosen, drawn, out=chosen)


def sample(
    logits: Tensor | Mapping[int, Tensor] | None,
    rows: Sequence[SamplingRow],
    drafts: Sequence[Sequence[int]],
    chosen: Sequence[int],
) -> list[list[SampledToken | StageError]]:
    """For each row its tokens: one, and where it has a draft one more behind each token of that which it has sampled,
    too. A row that cannot be sampled ends with its own error, and gives no other's.

    logits: [R, V], of each row and then of each token of its draft; only those of rows that are not plain need be
    there. drafts: of each row; none: nobody has one. chosen: [R], what a Sampler has chosen of them. So a row has the
    same tokens, and draws as often, as if each of them had been sampled in a step of its own.
    """
    if not any(drafts):
        return [
            [_sample_one(logits, place, token, row, was_plain=row.is_plain)]
            for place, (token, row) in enumerate(zip(chosen, rows, strict=True))
        ]
    sampled: list[list[SampledToken | StageError]] = []
    first = 0
    for row, draft in zip(rows, drafts, strict=True):
        tokens: list[SampledToken | StageError] = []
        was_plain = row.is_plain  # when its tokens were chosen: one that is plain from here on has been given no draw
        for place, expected in enumerate((*draft, None), first):
            token = _sample_one(logits, place, chosen[place], row, was_plain=was_plain)
            tokens.append(token)
            if isinstance(token, StageError) or token.token_id != expected:
                break
        sampled.append(tokens)
        first += len(draft) + 1
    return sampled


def _sample_one(
    logits: Tensor | Mapping[int, Tensor] | None, place: int, chosen: int, row: SamplingRow, *, was_plain: bool
) -> SampledToken | StageError:
    """The next token of a row, recorded. was_plain: whether `chosen` is it."""
    if chosen < 0:
        return StageError("logits: got NaN or infinity, expected finite numbers; try dtype float32")
    token = SampledToken(chosen)
    if not was_plain:
        assert logits is not None
        try:
            token = row.sample(logits[place].to(torch.float32, copy=True))
        except StageError as error:
            return error
    row.record(token.token_id)
    return token


def largest(logits: Tensor) -> Tensor:
    """logits: [R, V] -> [R] int64: the first of the largest of each row, or -1 for a row that is not all finite."""
    found = find_largest(logits)
    return logits.argmax(-1).masked_fill_(~logits.isfinite().all(-1), -1) if found is None else found
