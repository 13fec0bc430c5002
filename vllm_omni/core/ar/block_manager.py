"""Who holds which block of the paged KV pool, and which blocks can serve a prompt again. Holds numbers only, no
tensors.

A block that is computed whole is entered under a sha256 over the hash of the block before it and the content of its own
tokens; a hit also compares that content. The chain begins with a hash of the sequence's adapter, so that sequences of
different adapters share nothing. Freed blocks keep their entry until they are taken for something else, least recently
used first.

A block that was never taken has no memory yet. So blocks that serve no prefix are taken first, then, as long as there
are few that only serve prefixes, ones that were never taken, and then the least recently used. Few are as many as half
of the most that sequences have held at once, or a number that is given: memory grows with use, and not to the end of
the pool because nothing is ever used again.

Where every layer sees a window alone, the blocks behind it are given back while the sequence goes on; their places in
its block table stay, and nobody reads them. A prefix then needs no more than the blocks that its next token sees.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256

from vllm_omni.core.ar.cache_window import CacheWindow
from vllm_omni.core.ar.sequence import CacheState, Sequence
from vllm_omni.errors import CacheError

ROOT_HASH = sha256(b"the empty prefix").digest()


def root_hash(adapter: str | None) -> bytes:
    """The hash before the first block of a sequence."""
    return ROOT_HASH if adapter is None else sha256(ROOT_HASH + adapter.encode()).digest()


@dataclass(slots=True)
class Block:
    """One block, and while it may serve prefixes what it holds."""

    num_references: int = 0
    key: bytes | None = None  # its chained hash; None while it serves no prefix, and then the fields below say nothing
    parent: bytes = ROOT_HASH  # hash of the block before it
    content_ids: tuple[int, ...] = ()
    adapter: str | None = None  # what computed it

    def holds(self, parent: bytes, content_ids: tuple[int, ...], adapter: str | None) -> bool:
        """Whether it is what its hash says; else two contents have the same hash."""
        return (self.parent, self.content_ids, self.adapter) == (parent, content_ids, adapter)


class BlockManager:
    """The pool of `num_blocks` blocks of `block_size` tokens. Every method that takes a sequence keeps its block table
    right.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        prefix_caching: bool = True,
        window: CacheWindow | None = None,
        least_kept: int | None = None,
    ) -> None:
        """window: of the whole model; None where a layer sees everything. least_kept: so many blocks may always be kept
        for prefixes alone; None: the whole pool.
        """
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._window = window
        self._prefix_caching = prefix_caching
        self._blocks = [Block() for _ in range(num_blocks)]
        self._least_kept = num_blocks if least_kept is None else least_kept
        self._num_touched = 0  # blocks, from the first on, that were ever taken
        self._most_held = 0  # blocks that sequences held at once
        self._free: OrderedDict[int, None] = OrderedDict()  # of these; without an entry first, then least recently used
        self._cached: dict[bytes, int] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds; they may still serve prefixes."""
        return len(self._free) + self.num_blocks - self._num_touched

    @property
    def num_touched_blocks(self) -> int:
        """Blocks that were ever held: what of the pool has memory."""
        return self._num_touched

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that this many tokens fill or begin."""
        return -(-num_tokens // self.block_size)

    def can_ever_hold(self, num_tokens: int) -> bool:
        """Whether the empty pool would have room for one sequence of this length."""
        return self._most_blocks(self.num_blocks_for(num_tokens)) <= self.num_blocks

    def can_admit(self, sequence: Sequence) -> bool:
        """Whether all known tokens of a sequence without blocks would find room now, prefix hits counted; with a
        window, the most of them that it holds at once.
        """
        self._expect(sequence, CacheState.UNALLOCATED, "admit")
        num_skipped, hits = self._find_prefix(sequence)
        num_revived = sum(self._blocks[block].num_references == 0 for block in hits)
        num_held = self._most_blocks(self.num_blocks_for(sequence.num_tokens) - num_skipped)
        return num_held - len(hits) <= self.num_free_blocks - num_revived

    def allocate(self, sequence: Sequence) -> None:
        """Starts the block table with the longest cached prefix; sets how many tokens are computed by that.

        At least the last token is left to compute, however much is cached: something must run to give logits.
        """
        self._expect(sequence, CacheState.UNALLOCATED, "allocate")
        num_skipped, hits = self._find_prefix(sequence)
        for block in hits:
            self._free.pop(block, None)
            self._blocks[block].num_references += 1
        self._most_held = max(self._most_held, self.num_blocks - self.num_free_blocks)
        sequence.block_table = [0] * num_skipped + hits
        sequence.num_released_blocks = num_skipped
        sequence.num_computed_tokens = len(sequence.block_table) * self.block_size
        sequence.cache_state = CacheState.ALLOCATED

    def holds(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether the table of a sequence has room for its first `num_tokens` tokens as it is."""
        return num_tokens <= len(sequence.block_table) * self.block_size

    def can_grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether the table of an allocated sequence could be made to hold its first `num_tokens` tokens."""
        self._expect(sequence, CacheState.ALLOCATED, "grow")
        return self.num_blocks_for(num_tokens) - len(sequence.block_table) <= self.num_free_blocks

    def grow(self, sequence: Sequence, num_tokens: int) -> None:
        """Takes the blocks that the first `num_tokens` tokens lack; CacheError, and nothing taken, when there are too
        few.
        """
        if not self.can_grow(sequence, num_tokens):
            raise CacheError(
                f"sequence {sequence.sequence_id}: got {self.num_free_blocks} free blocks, expected enough for "
                f"{num_tokens} tokens; ask can_grow first and preempt"
            )
        for _ in range(self.num_blocks_for(num_tokens) - len(sequence.block_table)):
            block = self._take()
            self._blocks[block].num_references = 1
            sequence.block_table.append(block)
        self._most_held = max(self._most_held, self.num_blocks - self.num_free_blocks)

    def shrink(self, sequence: Sequence) -> None:
        """Gives back the blocks behind those that its known tokens fill or begin: a draft took them."""
        self._expect(sequence, CacheState.ALLOCATED, "shrink")
        surplus = sequence.block_table[self.num_blocks_for(sequence.num_tokens) :]
        if surplus:
            sequence.block_table = sequence.block_table[: -len(surplus)]
            self._give_back(surplus)

    def commit(self, sequence: Sequence) -> None:
        """Enters the blocks whose tokens are all computed, so that other sequences may share them, and gives back those
        that no later token sees.

        A block whose content is entered already (an identical prompt in the same step) stays private.
        """
        self._expect(sequence, CacheState.ALLOCATED, "commit")
        if self._prefix_caching:
            self._enter(sequence)
        if self._window is not None:
            first = self._first_block(sequence.num_computed_tokens)
            self._give_back(sequence.block_table[sequence.num_released_blocks : first])
            sequence.num_released_blocks = max(first, sequence.num_released_blocks)

    def _enter(self, sequence: Sequence) -> None:
        num_full = sequence.num_computed_tokens // self.block_size
        if num_full == sequence.num_entered_blocks:
            return
        for index in range(max(sequence.num_released_blocks, sequence.num_entered_blocks), num_full):
            block = self._blocks[sequence.block_table[index]]
            key = self._hash(sequence, index)
            if block.key is None and key not in self._cached:
                block.key = key
                block.parent = self._parent(sequence, index)
                block.content_ids = self._content(sequence, index)
                block.adapter = sequence.adapter
                self._cached[key] = sequence.block_table[index]
        sequence.num_entered_blocks = num_full

    def free(self, sequence: Sequence) -> None:
        """Gives the blocks back for good. A sequence that holds none may be freed too; one that was freed may not."""
        if sequence.cache_state is CacheState.FREED:
            raise CacheError(
                f"sequence {sequence.sequence_id}: freed twice; free a sequence once, when it finishes or is aborted"
            )
        self._release(sequence)
        sequence.cache_state = CacheState.FREED

    def preempt(self, sequence: Sequence) -> None:
        """Gives the blocks back and lets the sequence start again, from whatever prefix is still cached by then."""
        self._expect(sequence, CacheState.ALLOCATED, "preempt")
        self._release(sequence)
        sequence.num_computed_tokens = 0
        sequence.cache_state = CacheState.UNALLOCATED

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """CacheError unless tables, reference counts, free list and prefix entries of all living `sequences` agree."""
        held: Counter[int] = Counter()
        for sequence in sequences:
            self._check_table(sequence)
            held.update(sequence.held_blocks)
        for number, block in enumerate(self._blocks):
            if block.num_references != held[number]:
                raise CacheError(
                    f"block {number}: {block.num_references} references, but {held[number]} tables hold it"
                )
            is_free = number in self._free or number >= self._num_touched
            if is_free != (block.num_references == 0):
                raise CacheError(f"block {number}: {block.num_references} references, free list says {is_free}")
            if block.key is not None and self._cached.get(block.key) != number:
                raise CacheError(f"block {number}: its key leads to block {self._cached.get(block.key)}")
            if block.num_references > 1 and block.key is None:
                raise CacheError(f"block {number}: shared by {block.num_references} sequences, but not entered")
        if len(self._cached) != sum(block.key is not None for block in self._blocks):
            raise CacheError("a prefix entry leads to a block that does not carry its key")

    def _check_table(self, sequence: Sequence) -> None:
        name, size = f"sequence {sequence.sequence_id}", len(sequence.block_table)
        if len(set(sequence.held_blocks)) != len(sequence.held_blocks):
            raise CacheError(f"{name}: the block table {sequence.block_table} names a block twice")
        if sequence.cache_state is not CacheState.ALLOCATED and (size or sequence.num_computed_tokens):
            raise CacheError(f"{name}: {sequence.cache_state.value}, but has {size} blocks")
        expected = self._first_block(sequence.num_computed_tokens)
        if sequence.num_released_blocks != expected:
            raise CacheError(f"{name}: {sequence.num_released_blocks} blocks given back, expected {expected}")
        if not self.num_blocks_for(sequence.num_computed_tokens) <= size <= self.num_blocks_for(sequence.num_tokens):
            raise CacheError(
                f"{name}: {size} blocks for {sequence.num_computed_tokens} of {sequence.num_tokens} tokens"
            )

    def _find_prefix(self, sequence: Sequence) -> tuple[int, list[int]]:
        """How many blocks of the longest prefix that is served nobody will read, and the others."""
        numbers: list[int | None] = []
        num_hits = num_in_row = 0
        for index in range((sequence.num_tokens - 1) // self.block_size if self._prefix_caching else 0):
            number = self._serving(sequence, index)
            if number is None and self._window is None:
                break
            numbers.append(number)
            num_in_row = 0 if number is None else num_in_row + 1
            if num_in_row >= index + 1 - self._first_block((index + 1) * self.block_size):
                num_hits = index + 1
        num_skipped = self._first_block(num_hits * self.block_size)
        return num_skipped, [number for number in numbers[num_skipped:num_hits] if number is not None]

    def _serving(self, sequence: Sequence, index: int) -> int | None:
        """The block that holds what a block of this sequence would."""
        number = self._cached.get(self._hash(sequence, index))
        if number is None:
            return None
        parent, content = self._parent(sequence, index), self._content(sequence, index)
        return number if self._blocks[number].holds(parent, content, sequence.adapter) else None

    def _first_block(self, position: int) -> int:
        return 0 if self._window is None else self._window.first_block(position, self.block_size)

    def _most_blocks(self, num_blocks: int) -> int:
        """Of so many blocks of one sequence, how many it holds at once."""
        return num_blocks if self._window is None else min(num_blocks, self._window.most_blocks(self.block_size))

    def _hash(self, sequence: Sequence, index: int) -> bytes:
        chain = sequence.block_hashes
        while len(chain) <= index:
            content = b"".join(token.to_bytes(32, "little") for token in self._content(sequence, len(chain)))
            chain.append(sha256(self._parent(sequence, len(chain)) + content).digest())
        return chain[index]

    def _parent(self, sequence: Sequence, index: int) -> bytes:
        """The hash before a block's own."""
        return sequence.block_hashes[index - 1] if index else root_hash(sequence.adapter)

    def _content(self, sequence: Sequence, index: int) -> tuple[int, ...]:
        ids = sequence.token_ids if sequence.content_ids is None else sequence.content_ids
        return tuple(ids[index * self.block_size : (index + 1) * self.block_size])

    def _release(self, sequence: Sequence) -> None:
        self._give_back(sequence.held_blocks)
        sequence.block_table, sequence.num_released_blocks, sequence.num_entered_blocks = [], 0, 0

    def _give_back(self, numbers: list[int]) -> None:
        for number in reversed(numbers):  # a prefix outlives what follows it
            block = self._blocks[number]
            block.num_references -= 1
            if block.num_references == 0:
                self._free[number] = None
                if block.key is None:
                    self._free.move_to_end(number, last=False)

    def _take(self) -> int:
        """One of the free blocks; its entry is gone."""
        oldest = next(iter(self._free), None)
        if self._num_touched < self.num_blocks and (oldest is None or self._grows(oldest)):
            self._num_touched += 1
            return self._num_touched - 1
        number, _ = self._free.popitem(last=False)
        self._forget(number)
        return number

    def _grows(self, oldest: int) -> bool:
        """Whether the free blocks, the oldest of which is given, are too few prefixes to lose one."""
        return self._blocks[oldest].key is not None and len(self._free) <= max(self._least_kept, self._most_held // 2)

    def _forget(self, number: int) -> None:
        block = self._blocks[number]
        if block.key is not None:
            del self._cached[block.key]
        self._blocks[number] = Block()

    def _expect(self, sequence: Sequence, state: CacheState, verb: str) -> None:
        if sequence.cache_state is not state:
            raise CacheError(
                f"sequence {sequence.sequence_id}: cannot {verb}, its cache is {sequence.cache_state.value}, "
                f"expected {state.value}"
            )
