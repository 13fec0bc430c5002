"""Which tokens of which sequences run in the next step of an AR stage: continuous batching with chunked prefill under a
token budget, and drafts of what comes next where there is room.

Owns the queues and, through its BlockManager, the blocks. Knows no tensors, no sampling and no clock.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass, replace

from vllm_omni.core.ar.block_manager import BlockManager
from vllm_omni.core.ar.prefill_pace import PrefillPace
from vllm_omni.core.ar.prompt_lookup import PromptLookup
from vllm_omni.core.ar.sequence import CacheState, Sequence, SequenceStatus
from vllm_omni.errors import CacheError, ResourceError


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, end) of a sequence, to be computed in one step: known ones, and behind them those of its draft."""

    sequence: Sequence
    start: int
    end: int
    samples: bool  # the logits of the last known token, and of each of the draft, give the one behind it
    draft: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return self.end - self.start

    @property
    def known_end(self) -> int:
        """Behind its last known token."""
        return self.end - len(self.draft)

    @property
    def token_ids(self) -> list[int]:
        """While nothing has been written behind them."""
        return [*self.sequence.token_ids[self.start : self.known_end], *self.draft]


class ARScheduler:
    """First come, first served. A step holds at most `max_num_seqs` sequences and `max_num_batched_tokens` tokens.

    Running sequences are served in the order of their arrival, then waiting ones are admitted. A prompt takes all of
    the budget that is left, so a long prompt holds up nobody who writes; beside one that writes and is watched, prompts
    take no more than a pace allows, so that the step is not too long for who reads along. When blocks run out the
    newest is preempted and will be computed again, so that the oldest never lacks any.

    A sequence may be idle: paused, or nothing of it is ready to be computed. It keeps its blocks and its place, and
    others overtake it. When all the blocks or places that someone needs are held by idle ones, and nothing else can
    run, the newest idle one gives way, whatever its age: what it waits for may wait for the others.

    Drafts take tokens and blocks that nobody else wants in the step, and of its `max_num_seqs` rows those that no
    sequence has; older sequences first.
    """

    def __init__(
        self,
        blocks: BlockManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        lookup: PromptLookup | None = None,
        pace: PrefillPace | None = None,
    ) -> None:
        """lookup: gives the drafts; None: there are none. pace: None: prompts take all that is left."""
        self.blocks = blocks
        self._lookup = lookup
        self._pace = pace
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._budget = 0  # tokens that the step which is being filled may still take
        self._prompt_budget = 0  # of them those of prompts, and of what is computed again
        self._has_prompts = False  # whether the step that was filled last computes such
        self.num_preemptions = 0
        self.num_drafted_tokens = self.num_accepted_tokens = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def has_work(self) -> bool:
        """Whether there is a token to compute; idle sequences are no work."""
        return any(sequence.num_computable_tokens for sequence in (*self._running, *self._waiting))

    def add(self, sequence: Sequence) -> None:
        """Queues a new sequence; ResourceError when the whole pool could not hold it."""
        if not self.blocks.can_ever_hold(sequence.max_tokens):
            raise ResourceError(
                f"request {sequence.request_id!r}: got {sequence.max_tokens} tokens, expected at most "
                f"{self.blocks.num_blocks * self.blocks.block_size}, the whole KV pool; raise num_blocks"
            )
        self._waiting.append(sequence)

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step, their blocks taken. Empty only when there is no work."""
        chunks = self._fill_step()
        while not chunks and self.has_work():
            idle = [sequence for sequence in self._running if not sequence.num_computable_tokens]
            self._preempt(idle[-1])
            chunks = self._fill_step()
        return chunks if self._lookup is None else self._with_drafts(chunks, self._lookup)

    def _fill_step(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        self._budget = self._prompt_budget = self._max_num_batched_tokens
        self._has_prompts = False
        running = [(sequence, sequence.is_one_behind) for sequence in self._running]
        if self._waiting or not all(is_one_behind for _, is_one_behind in running):
            self._prompt_budget = self._paced_budget()
        for sequence, is_one_behind in running:
            if sequence.status is SequenceStatus.RUNNING:  # else preempted a moment ago
                self._continue(sequence, is_one_behind, chunks)
        self._admit(chunks)  # what was preempted just now finds no room: it lost at least one of the blocks it needs
        return chunks

    def grow_ahead(self, chunks: list[Chunk]) -> list[bool]:
        """Which sequences of a step of single tokens go on in the next, whose blocks are taken then; none where the
        next step would most likely hold others, or drafts, or there are too few blocks.
        """
        has_room = len(self._running) < self._max_num_seqs
        is_joined = has_room and any(sequence.num_computable_tokens for sequence in self._waiting)
        if self._lookup is not None or is_joined or len(chunks) < len(self._running):
            return []
        goes_on = [chunk.end + 1 < chunk.sequence.max_tokens for chunk in chunks]
        for chunk, does in zip(chunks, goes_on, strict=True):
            if does and not self.blocks.holds(chunk.sequence, chunk.end + 1):
                if not self.blocks.can_grow(chunk.sequence, chunk.end + 1):
                    return []
                self.blocks.grow(chunk.sequence, chunk.end + 1)
        return goes_on if any(goes_on) else []

    def learn(self, chunks: list[Chunk], step_s: float) -> None:
        """What the step of these chunks has taken."""
        if self._pace is not None and self._has_prompts:
            self._pace.learn(sum(chunk.num_tokens for chunk in chunks), step_s)

    def advance(self, chunk: Chunk) -> None:
        """Notes that a chunk has been computed. Of its draft nothing counts yet."""
        sequence = chunk.sequence
        if sequence.num_computed_tokens != chunk.start or sequence.status is not SequenceStatus.RUNNING:
            raise CacheError(
                f"sequence {sequence.sequence_id}: got a chunk from token {chunk.start} in the {sequence.status.value} "
                f"queue, expected one from token {sequence.position} in the running queue"
            )
        self._commit(sequence, chunk.known_end)

    def accept(self, sequence: Sequence) -> None:
        """Notes that the token which was written last is that of the draft, and so computed."""
        self._commit(sequence, sequence.num_tokens)
        sequence.num_accepted_tokens += 1
        self.num_accepted_tokens += 1

    def settle(self, chunk: Chunk) -> None:
        """Ends the step of a chunk whose sequence goes on, when what it sampled is written: what was computed of its
        draft beyond that is void.
        """
        if chunk.draft and self._lookup is not None:
            sequence = chunk.sequence
            self._lookup.learn(sequence, len(chunk.draft), sequence.num_computed_tokens - chunk.known_end)
            self.blocks.shrink(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Ends a sequence, finished or aborted, wherever it stands, and frees its blocks; one that has ended is left
        alone.
        """
        if sequence.status is SequenceStatus.FINISHED:
            return
        queue = self._running if sequence.status is SequenceStatus.RUNNING else self._waiting
        queue.remove(sequence)
        self.blocks.free(sequence)
        sequence.status = SequenceStatus.FINISHED
        if self._lookup is not None:
            self._lookup.forget(sequence)

    def check_integrity(self) -> None:
        """CacheError when queues, statuses, order or blocks disagree."""
        for queue, status in ((self._running, SequenceStatus.RUNNING), (self._waiting, SequenceStatus.WAITING)):
            for sequence in queue:
                if sequence.status is not status:
                    raise CacheError(
                        f"sequence {sequence.sequence_id}: {sequence.status.value} in the {status.value} queue"
                    )
        for queue in (self._running, self._waiting):
            ids = [sequence.sequence_id for sequence in queue]
            if ids != sorted(set(ids)):
                raise CacheError(f"sequences out of order: {ids}")
        for sequence in self._waiting:
            if sequence.cache_state is not CacheState.UNALLOCATED:
                raise CacheError(
                    f"sequence {sequence.sequence_id}: waits, but its cache is {sequence.cache_state.value}"
                )
        self.blocks.check_integrity([*self._running, *self._waiting])

    def _paced_budget(self) -> int:
        writing = [s for s in self._running if s.is_one_behind and s.num_computable_tokens > 0]
        if self._pace is None or not any(s.is_watched for s in writing):
            return self._max_num_batched_tokens
        paced = self._pace.prompt_tokens(len(writing))
        return self._max_num_batched_tokens if paced is None else paced

    def _share(self, sequence: Sequence, is_one_behind: bool) -> int:
        """How many of its tokens run in the step that is being filled."""
        limit = self._budget if is_one_behind else min(self._budget, self._prompt_budget)
        return min(sequence.num_computable_tokens, limit)

    def _continue(self, sequence: Sequence, is_one_behind: bool, chunks: list[Chunk]) -> None:
        num_tokens = self._share(sequence, is_one_behind)
        if num_tokens == 0:
            return
        end = sequence.num_computed_tokens + num_tokens
        while not self.blocks.holds(sequence, end) and not self.blocks.can_grow(sequence, end):
            victim = self._running[-1]  # at or after `sequence`, so not among the chunks yet
            self._preempt(victim)
            if victim is sequence:
                return
        self._take(sequence, num_tokens, is_one_behind, chunks)

    def _admit(self, chunks: list[Chunk]) -> None:
        for sequence in [sequence for sequence in self._waiting if sequence.num_computable_tokens]:
            if (
                min(self._budget, self._prompt_budget) == 0
                or len(self._running) == self._max_num_seqs
                or not self.blocks.can_admit(sequence)
            ):
                return
            self._waiting.remove(sequence)
            insort(self._running, sequence, key=_order)
            sequence.status = SequenceStatus.RUNNING
            self.blocks.allocate(sequence)
            if sequence.num_cached_tokens is None:
                sequence.num_cached_tokens = sequence.num_computed_tokens
            sequence.num_reached_tokens = max(sequence.num_reached_tokens, sequence.num_computed_tokens)
            is_one_behind = sequence.is_one_behind
            num_tokens = self._share(sequence, is_one_behind)
            if num_tokens:  # none when the prefix cache served all that is ready
                self._take(sequence, num_tokens, is_one_behind, chunks)

    def _take(self, sequence: Sequence, num_tokens: int, is_one_behind: bool, chunks: list[Chunk]) -> None:
        start = sequence.num_computed_tokens
        end = start + num_tokens
        if not self.blocks.holds(sequence, end):
            self.blocks.grow(sequence, end)
        self._budget -= num_tokens
        if not is_one_behind:
            self._prompt_budget -= num_tokens
            self._has_prompts = True
        chunks.append(Chunk(sequence, start, end, sequence.is_writing and end == len(sequence.token_ids)))

    def _with_drafts(self, chunks: list[Chunk], lookup: PromptLookup) -> list[Chunk]:
        room = min(self._budget, self._max_num_seqs - len(chunks))
        drafted: list[Chunk] = []
        for chunk in chunks:
            if chunk.samples and room:
                chunk = self._with_draft(chunk, lookup, room)
                room -= len(chunk.draft)
            drafted.append(chunk)
        return drafted

    def _with_draft(self, chunk: Chunk, lookup: PromptLookup, room: int) -> Chunk:
        """The chunk with a draft of up to `room` tokens, its blocks taken."""
        sequence = chunk.sequence
        draft = lookup.draft(sequence, min(room, sequence.num_draftable_tokens))
        while draft and not self.blocks.can_grow(sequence, chunk.end + len(draft)):
            draft.pop()
        if not draft:
            return chunk
        end = chunk.end + len(draft)
        self.blocks.grow(sequence, end)
        sequence.num_drafted_tokens += len(draft)
        self.num_drafted_tokens += len(draft)
        return replace(chunk, end=end, draft=tuple(draft))

    def _commit(self, sequence: Sequence, num_computed: int) -> None:
        sequence.num_computed_tokens = num_computed
        if num_computed > sequence.num_reached_tokens:
            sequence.num_reached_tokens = num_computed
        self.blocks.commit(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        insort(self._waiting, sequence, key=_order)
        self.blocks.preempt(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.num_preemptions += 1
        self.num_preemptions += 1


def _order(sequence: Sequence) -> int:
    return sequence.sequence_id
