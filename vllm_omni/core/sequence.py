"""One token sequence on its way through an AR stage: its tokens, how far they are computed, and its share of the KV
pool.

Knows no request parameters and no tensors. The block table is written by the BlockManager alone, the status by the
ARScheduler alone.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


class SequenceStatus(enum.Enum):
    """Which queue a sequence stands in; preemption leads from RUNNING back to WAITING."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class CacheState(enum.Enum):
    """Whether a sequence holds KV blocks. FREED is final: a sequence that was preempted is UNALLOCATED again, not
    FREED.
    """

    UNALLOCATED = "unallocated"
    ALLOCATED = "allocated"
    FREED = "freed"


@dataclass(slots=True, eq=False)
class Sequence:
    """Prompt and written tokens of one sample.

    sequence_id: unique in its engine and increasing with arrival. max_tokens: the most tokens, prompt included, that it
    can ever hold in the KV pool. is_writing: whether a token is to be sampled once every known token is computed; an
    encoded prompt never writes. num_computed_tokens: how many tokens, from the first on, have their keys and values in
    the pool. num_cached_tokens: how many prompt tokens the prefix cache served at the first admission (None before it).
    block_hashes: the hash chain of the full blocks of `token_ids`, as far as it was needed; it outlives preemption.
    """

    sequence_id: int
    request_id: str
    token_ids: list[int]
    max_tokens: int
    is_writing: bool = True
    num_prompt_tokens: int = field(init=False)
    num_computed_tokens: int = 0
    num_cached_tokens: int | None = None
    num_preemptions: int = 0
    status: SequenceStatus = SequenceStatus.WAITING
    cache_state: CacheState = CacheState.UNALLOCATED
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)

    @property
    def num_tokens(self) -> int:
        """Known tokens: the prompt and what has been written."""
        return len(self.token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        """Known tokens whose keys and values are not in the pool."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def position(self) -> int:
        """The position of the next token to compute."""
        return self.num_computed_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """What has been written so far."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    def append(self, token_id: int) -> None:
        """Takes a sampled token in."""
        self.token_ids.append(token_id)
