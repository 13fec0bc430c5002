"""Drafts of what a sequence will write, looked up in its own tokens (prompt lookup by n-grams): where its last tokens
stood before, and what followed them there. Numbers only; which draft tokens are right is found by computing them.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field

from vllm_omni.core.ar.sequence import Sequence


@dataclass(slots=True)
class _Memory:
    """Of one sequence."""

    most: int  # tokens of its next draft
    num_read: int = 0  # tokens whose n-grams are known
    continuations: dict[tuple[int, ...], int] = field(default_factory=dict)  # n-gram -> the place behind its last one


class PromptLookup:
    """Drafts of up to `max_tokens` tokens, from the last place where the longest n-gram, of `max_ngram` down to
    `min_ngram` tokens, stood that the sequence ends with.

    A sequence whose drafts are wrong gets shorter ones, down to one token, and longer ones again while they are right:
    so that what does not repeat itself costs next to nothing.
    """

    def __init__(self, max_tokens: int, min_ngram: int, max_ngram: int) -> None:
        self._max_tokens = max_tokens
        self._min_ngram = min_ngram
        self._max_ngram = max_ngram
        self._memories: dict[int, _Memory] = {}

    def draft(self, sequence: Sequence, most: int) -> list[int]:
        """Up to `most` tokens that may follow; none where the sequence ends with nothing that it has held before."""
        memory = self._memories.setdefault(sequence.sequence_id, _Memory(self._max_tokens))
        tokens = sequence.token_ids
        self._read(memory, tokens)
        for size in range(self._max_ngram, self._min_ngram - 1, -1):
            place = memory.continuations.get(tuple(tokens[-size:])) if size <= len(tokens) else None
            if place is not None:
                return repeated(tokens, place, min(most, memory.most))
        return []

    def learn(self, sequence: Sequence, num_drafted: int, num_accepted: int) -> None:
        """How much of a draft was right."""
        memory = self._memories[sequence.sequence_id]
        memory.most = min(2 * memory.most if num_accepted == num_drafted else num_accepted + 1, self._max_tokens)

    def forget(self, sequence: Sequence) -> None:
        """A sequence has ended."""
        self._memories.pop(sequence.sequence_id, None)

    def _read(self, memory: _Memory, tokens: Many[int]) -> None:
        """The n-grams that have a token behind them."""
        for place in range(max(memory.num_read, self._min_ngram), len(tokens)):
            for size in range(self._min_ngram, min(self._max_ngram, place) + 1):
                memory.continuations[tuple(tokens[place - size : place])] = place
        memory.num_read = len(tokens)


def repeated(tokens: Many[int], place: int, count: int) -> list[int]:
    """The tokens from a place on as if they went on so: behind the last one it begins again at the place."""
    period = len(tokens) - place
    return [tokens[place + index % period] for index in range(count)]
