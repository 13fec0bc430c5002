"""One token sequence on its way through an AR stage: its tokens, how far they are computed, and its share of the KV
pool.

Knows no request parameters and no tensors. The block table is written by the BlockManager alone, the status by the
ARScheduler alone.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

PAD_CONTENT = 1 << 254  # the content id of any pad; on which tokens it depends, the hash of its block says


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
    """Prompt and written tokens of one sample."""

    sequence_id: int  # unique in its engine and increasing with arrival
    request_id: str
    token_ids: list[int]  # the prompt, then what has been written
    max_tokens: int  # the most tokens, prompt included, that it can ever hold in the KV pool
    is_writing: bool = True  # whether a token is sampled once all are computed; an encoded prompt never writes
    num_pads: int = 0  # of its last tokens; nothing sees them, not even they themselves: they see those before them all
    content_ids: list[int] | None = None  # what the prefix cache compares, where ids do not say it (media); None: ids
    adapter: str | None = None  # the LoRA adapter that computes it; blocks are shared under the same adapter alone
    num_ready_tokens: int | None = None  # tokens that have all their inputs and may be computed; None: every known one
    is_paused: bool = False  # nothing of it is computed for now
    is_watched: bool = False  # somebody reads along, and does not want to wait for others' prompts
    num_prompt_tokens: int = field(init=False)
    num_computed_tokens: int = 0  # tokens, from the first on, whose keys and values are in the pool
    num_reached_tokens: int = 0  # the most that ever were
    num_cached_tokens: int | None = None  # prompt tokens that the prefix cache served at the first admission
    num_preemptions: int = 0
    num_drafted_tokens: int = 0  # that were computed as a draft of what it would write
    num_accepted_tokens: int = 0  # of these, that it wrote
    status: SequenceStatus = SequenceStatus.WAITING
    cache_state: CacheState = CacheState.UNALLOCATED
    block_table: list[int] = field(default_factory=list)  # grows in place; another list when it is shorter
    num_released_blocks: int = (
        0  # of its first blocks, given back: no token reads them again; their numbers say nothing
    )
    num_entered_blocks: int = 0  # of its first blocks, that were full at a commit: the prefix cache has seen them
    block_hashes: list[bytes] = field(default_factory=list)  # of the full blocks, as far as needed; outlives preemption

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)
        if self.content_ids is not None and len(self.content_ids) != len(self.token_ids):
            raise ValueError(f"got {len(self.content_ids)} content ids for {len(self.token_ids)} tokens")
        if self.num_pads:
            seen = self.token_ids if self.content_ids is None else self.content_ids
            self.content_ids = [*seen[: self.num_seen_tokens], *[PAD_CONTENT] * self.num_pads]

    @property
    def num_tokens(self) -> int:
        """Known tokens: the prompt and what has been written."""
        return len(self.token_ids)

    @property
    def num_seen_tokens(self) -> int:
        """Known tokens without the pads behind them."""
        return len(self.token_ids) - self.num_pads

    @property
    def num_uncomputed_tokens(self) -> int:
        """Known tokens whose keys and values are not in the pool."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_one_behind(self) -> bool:
        """Whether its last known token, one that it has written, is all that is not computed."""
        num_tokens = len(self.token_ids)
        return num_tokens > self.num_prompt_tokens and num_tokens - self.num_computed_tokens == 1

    @property
    def num_computable_tokens(self) -> int:
        """Uncomputed tokens that are to be computed now: 0 while it is paused or waits for its inputs. What a preempted
        one had computed is computed again only when something new follows it.
        """
        if self.is_paused:
            return 0
        known = len(self.token_ids)
        ready = known if self.num_ready_tokens is None else min(known, self.num_ready_tokens)
        return ready - self.num_computed_tokens if ready > self.num_reached_tokens else 0

    @property
    def num_draftable_tokens(self) -> int:
        """Tokens behind the known ones that may be computed as a draft: the last that it may write needs no logits."""
        end = self.max_tokens - 1 if self.num_ready_tokens is None else min(self.max_tokens - 1, self.num_ready_tokens)
        return max(end - len(self.token_ids), 0)

    @property
    def held_blocks(self) -> list[int]:
        """The part of the block table that is its own."""
        return self.block_table[self.num_released_blocks :] if self.num_released_blocks else self.block_table

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
        """Adds a sampled token."""
        self.token_ids.append(token_id)
        if self.content_ids is not None:
            self.content_ids.append(token_id)
