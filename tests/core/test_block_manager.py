"""The paged KV pool as numbers: sharing, eviction, states, and the content that every block table promises."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.pool_content import PoolContent

from vllm_omni.core.ar import block_manager
from vllm_omni.core.ar.block_manager import BlockManager
from vllm_omni.core.ar.cache_window import CacheWindow
from vllm_omni.core.ar.sequence import CacheState, Sequence
from vllm_omni.errors import CacheError

SIZE = 4


def make_sequence(
    tokens: list[int], number: int = 0, content: list[int] | None = None, adapter: str | None = None
) -> Sequence:
    return Sequence(
        number, f"r{number}", list(tokens), max_tokens=len(tokens) + 8, content_ids=content, adapter=adapter
    )


def compute_all(blocks: BlockManager, sequence: Sequence) -> Sequence:
    """Allocates a sequence and computes all its tokens."""
    blocks.allocate(sequence)
    blocks.grow(sequence, sequence.num_tokens)
    sequence.num_computed_tokens = sequence.num_tokens
    blocks.commit(sequence)
    return sequence


def test_equal_prefixes_share_whole_blocks_alone() -> None:
    blocks = BlockManager(16, SIZE)
    first = compute_all(blocks, make_sequence(list(range(10)), 1))
    second = compute_all(blocks, make_sequence([*range(8), 99, 98, 97], 2))
    assert second.block_table[:2] == first.block_table[:2]
    assert second.block_table[2] != first.block_table[2]
    blocks.check_integrity([first, second])


def test_the_same_block_after_another_prefix_is_not_shared() -> None:
    blocks = BlockManager(16, SIZE)
    compute_all(blocks, make_sequence([1, 1, 1, 1, 5, 6, 7, 8, 9], 1))
    other = make_sequence([2, 2, 2, 2, 5, 6, 7, 8, 9], 2)
    blocks.allocate(other)
    assert other.num_computed_tokens == 0


@pytest.mark.parametrize("length", [4, 5, 8, 12])
def test_a_wholly_cached_prompt_leaves_its_last_token_to_compute(length: int) -> None:
    blocks = BlockManager(16, SIZE)
    compute_all(blocks, make_sequence(list(range(length)), 1))
    again = make_sequence(list(range(length)), 2)
    blocks.allocate(again)
    assert again.num_computed_tokens == (length - 1) // SIZE * SIZE < length


def test_tokens_of_another_content_are_not_shared_and_those_of_the_same_are() -> None:
    blocks = BlockManager(16, SIZE)
    wide = [1 << 255 | number for number in range(3)]
    compute_all(blocks, first := make_sequence([7] * 9, 1, [7, *wide, 7, 7, 7, 7, 7]))
    same = make_sequence([7] * 9, 2, [7, *wide, 7, 7, 7, 7, 6])
    blocks.allocate(same)
    assert same.block_table == first.block_table[:2]
    other = make_sequence([7] * 9, 3, [7, *wide[::-1], 7, 7, 7, 7, 7])
    plain = make_sequence([7] * 9, 4)
    for stranger in (other, plain):
        blocks.allocate(stranger)
        assert stranger.block_table == []
    compute_all(blocks, twin := make_sequence([7] * 9, 5, [7] * 9))
    again = make_sequence([7] * 9, 6)
    blocks.allocate(again)
    assert again.block_table == twin.block_table[:2], "content ids that are the token ids say nothing new"


@given(
    tokens=st.lists(st.integers(0, 1), min_size=9, max_size=17),
    adapters=st.lists(st.sampled_from([None, "", "a", "b", "ab"]), min_size=2, max_size=2, unique=True),
)
def test_equal_tokens_under_different_adapters_share_no_block(tokens: list[int], adapters: list[str | None]) -> None:
    blocks = BlockManager(32, SIZE)
    first, other, again = (
        compute_all(blocks, make_sequence(tokens, number, adapter=adapter))
        for number, adapter in enumerate([adapters[0], adapters[1], adapters[0]])
    )
    assert not set(first.block_table) & set(other.block_table)
    assert not set(first.block_hashes) & set(other.block_hashes)
    assert again.block_table[:2] == first.block_table[:2], "the same adapter shares"
    blocks.check_integrity([first, other, again])


def test_a_written_token_is_its_own_content() -> None:
    sequence = make_sequence([7, 7], 1, [1 << 200, 7])
    sequence.append(5)
    assert sequence.content_ids == [1 << 200, 7, 5]
    with pytest.raises(ValueError, match="1 content ids for 2 tokens"):
        make_sequence([7, 7], 2, [7])


def test_identical_prompts_in_one_step_stay_consistent() -> None:
    blocks = BlockManager(16, SIZE)
    twins = [make_sequence(list(range(9)), number) for number in range(3)]
    for twin in twins:
        blocks.allocate(twin)
        blocks.grow(twin, 9)
    for twin in twins:
        twin.num_computed_tokens = 9
        blocks.commit(twin)
        blocks.check_integrity(twins)
    while twins:
        blocks.free(twins.pop())
        blocks.check_integrity(twins)
    assert blocks.num_free_blocks == 16


def test_freed_blocks_serve_prefixes_until_they_are_taken() -> None:
    blocks = BlockManager(3, SIZE)
    blocks.free(compute_all(blocks, make_sequence(list(range(9)), 1)))
    assert blocks.num_free_blocks == 3
    again = compute_all(blocks, make_sequence(list(range(9)), 2))
    assert again.num_computed_tokens == 9
    blocks.free(again)
    compute_all(blocks, stranger := make_sequence(list(range(50, 62)), 3))
    blocks.free(stranger)
    gone = make_sequence(list(range(9)), 4)
    blocks.allocate(gone)
    assert gone.num_computed_tokens == 0, "a reallocated block must not answer to its old prefix"


def test_the_least_recently_used_prefix_is_taken_first_and_its_tail_before_its_head() -> None:
    blocks = BlockManager(4, SIZE)
    old = compute_all(blocks, make_sequence([1] * 8, 1))
    young = compute_all(blocks, make_sequence([2] * 8, 2))
    blocks.free(old)
    blocks.free(young)
    compute_all(blocks, make_sequence([3] * 4, 3))
    hits = {}
    for number, token in ((4, 1), (5, 2)):
        sequence = make_sequence([token] * 9, number)
        blocks.allocate(sequence)
        hits[token] = sequence.num_computed_tokens
        blocks.free(sequence)
    assert hits == {1: 4, 2: 8}


def live(blocks: BlockManager, tokens: list[int], number: int) -> int:
    """A sequence that is computed and freed; how many of its tokens were cached."""
    sequence = make_sequence(tokens, number)
    blocks.allocate(sequence)
    cached = sequence.num_computed_tokens
    blocks.grow(sequence, sequence.num_tokens)
    sequence.num_computed_tokens = sequence.num_tokens
    blocks.commit(sequence)
    blocks.free(sequence)
    blocks.check_integrity([])
    return cached


def test_blocks_that_serve_no_prefix_are_taken_again_before_any_that_was_never_used() -> None:
    blocks = BlockManager(64, SIZE, prefix_caching=False)
    for number in range(9):
        live(blocks, list(range(number, number + 4 * SIZE)), number)
    assert blocks.num_touched_blocks == 4 and blocks.num_free_blocks == 64


def test_prefixes_that_nothing_uses_take_no_more_memory_than_half_of_what_was_in_use_at_once() -> None:
    blocks = BlockManager(1000, SIZE, least_kept=3)
    for number in range(50):
        live(blocks, [number] * (10 * SIZE), number)
    assert blocks.num_touched_blocks <= 10 + 10 // 2 + 1
    assert live(blocks, [49] * (10 * SIZE), 98) > 0, "the newest are still there"
    many = [compute_all(blocks, make_sequence([200 + number] * (10 * SIZE), 200 + number)) for number in range(5)]
    for sequence in many:
        blocks.free(sequence)
    for number in range(300, 400):
        live(blocks, [number] * (10 * SIZE), number)
    assert 50 <= blocks.num_touched_blocks <= 50 + 50 // 2 + 1, "who uses more may keep more"


@pytest.mark.parametrize(("least_kept", "touched"), [(None, 200), (20, 31)])
def test_as_many_prefixes_as_are_said_are_kept_in_any_case(least_kept: int | None, touched: int) -> None:
    blocks = BlockManager(200, SIZE, least_kept=least_kept)
    for number in range(50):
        live(blocks, [number] * (10 * SIZE), number)
    assert touched - 10 <= blocks.num_touched_blocks <= touched
    kept = [live(blocks, [number] * (10 * SIZE), 100 + number) for number in range(49, 47, -1)]
    assert kept == [9 * SIZE] * 2 if least_kept is None else kept[0] == 9 * SIZE


def test_without_prefix_caching_nothing_is_shared() -> None:
    blocks = BlockManager(8, SIZE, prefix_caching=False)
    compute_all(blocks, make_sequence(list(range(9)), 1))
    again = make_sequence(list(range(9)), 2)
    blocks.allocate(again)
    assert again.block_table == []


def test_a_hash_collision_is_no_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    class Colliding:
        def __init__(self, data: bytes = b"") -> None: ...
        def digest(self) -> bytes:
            return b"always the same"

    monkeypatch.setattr(block_manager, "sha256", Colliding)
    blocks = BlockManager(8, SIZE)
    compute_all(blocks, make_sequence([1, 2, 3, 4, 5], 1))
    other = make_sequence([9, 9, 9, 9, 5], 2)
    blocks.allocate(other)
    assert other.block_table == []
    same = make_sequence([1, 2, 3, 4, 7], 3)
    blocks.allocate(same)
    assert same.num_computed_tokens == 4


def test_a_hash_collision_of_adapters_is_no_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_manager, "root_hash", lambda adapter: b"always the same")
    blocks = BlockManager(8, SIZE)
    compute_all(blocks, make_sequence([1, 2, 3, 4, 5], 1, adapter="a"))
    other = make_sequence([1, 2, 3, 4, 5], 2, adapter="b")
    blocks.allocate(other)
    assert other.block_table == []
    same = make_sequence([1, 2, 3, 4, 5], 3, adapter="a")
    blocks.allocate(same)
    assert same.num_computed_tokens == 4


def test_a_grow_that_fails_takes_nothing() -> None:
    blocks = BlockManager(2, SIZE)
    sequence = make_sequence(list(range(20)))
    blocks.allocate(sequence)
    assert not blocks.can_grow(sequence, 9)
    with pytest.raises(CacheError, match="2 free blocks, expected enough for 9"):
        blocks.grow(sequence, 9)
    assert (sequence.block_table, blocks.num_free_blocks) == ([], 2)


def test_prefix_hits_on_free_blocks_are_not_counted_twice() -> None:
    blocks = BlockManager(3, SIZE)
    blocks.free(compute_all(blocks, make_sequence(list(range(8)), 1)))
    blocks.allocate(other := make_sequence([7] * 4, 2))
    blocks.grow(other, 4)
    longer = make_sequence(list(range(13)), 3)  # hits two free blocks, needs two more, none is left
    assert not blocks.can_admit(longer)
    assert blocks.can_admit(make_sequence(list(range(8)), 4))


def test_every_misuse_is_a_cache_error() -> None:
    blocks = BlockManager(4, SIZE)
    sequence = make_sequence([1, 2, 3])
    for misuse in (blocks.commit, blocks.preempt, lambda s: blocks.grow(s, 3)):
        with pytest.raises(CacheError, match="unallocated, expected allocated"):
            misuse(sequence)
    compute_all(blocks, sequence)
    with pytest.raises(CacheError, match="cannot allocate, its cache is allocated"):
        blocks.allocate(sequence)
    blocks.free(sequence)
    assert sequence.cache_state is CacheState.FREED
    with pytest.raises(CacheError, match="freed twice"):
        blocks.free(sequence)
    with pytest.raises(CacheError, match="cannot allocate, its cache is freed"):
        blocks.allocate(sequence)


@pytest.mark.parametrize("damage", ["reference", "free", "table", "unknown", "released"])
def test_check_integrity_sees_damage(damage: str) -> None:
    blocks = BlockManager(4, SIZE)
    sequence = compute_all(blocks, make_sequence(list(range(6))))
    blocks.check_integrity([sequence])
    internals: Any = blocks
    if damage == "reference":
        internals._blocks[sequence.block_table[0]].num_references += 1
    elif damage == "free":
        internals._free[sequence.block_table[0]] = None
    elif damage == "table":
        sequence.block_table.pop()
    elif damage == "released":
        sequence.num_released_blocks = 1
    living = [] if damage == "unknown" else [sequence]
    with pytest.raises(CacheError):
        blocks.check_integrity(living)


def test_blocks_behind_the_window_are_given_back_while_the_sequence_goes_on() -> None:
    blocks = BlockManager(8, SIZE, window=CacheWindow(size=6, max_chunk=4))
    sequence = make_sequence(list(range(4)))
    blocks.allocate(sequence)
    for end in range(4, 200):
        blocks.grow(sequence, end)
        sequence.num_computed_tokens = end
        blocks.commit(sequence)
        blocks.check_integrity([sequence])
        assert sequence.num_released_blocks == max(0, end - 5) // SIZE
        assert 8 - blocks.num_free_blocks == len(sequence.held_blocks) <= 3
        sequence.append(end)
    blocks.free(sequence)
    assert blocks.num_free_blocks == 8


def test_a_prefix_needs_no_more_than_what_its_next_token_sees() -> None:
    blocks = BlockManager(4, SIZE, window=CacheWindow(size=6, max_chunk=4))
    sequence = make_sequence(list(range(4)), 1)
    blocks.allocate(sequence)
    for end in range(4, 33, 4):  # its first blocks serve its later ones
        sequence.token_ids += range(sequence.num_tokens, end)
        blocks.grow(sequence, end)
        sequence.num_computed_tokens = end
        blocks.commit(sequence)
    blocks.free(sequence)
    again = make_sequence(list(range(40)), 2)
    assert blocks.can_admit(again)
    blocks.allocate(again)
    assert again.num_computed_tokens == 32 and again.num_released_blocks == 6 and len(again.held_blocks) == 2
    blocks.check_integrity([again])
    blocks.free(again)
    other = make_sequence([9, *range(1, 40)], 3)
    blocks.allocate(other)
    assert other.num_computed_tokens == 0, "the same block after another prefix is not shared"


def test_a_window_holds_sequences_longer_than_the_pool() -> None:
    window = CacheWindow(size=6, max_chunk=4)
    assert window.most_blocks(SIZE) == 3
    assert BlockManager(3, SIZE, window=window).can_ever_hold(10_000)
    assert not BlockManager(2, SIZE, window=window).can_ever_hold(10_000)
    assert BlockManager(2, SIZE, window=window).can_ever_hold(8)


class BlockManagerMachine(RuleBasedStateMachine):
    """Random lives of sequences over few tokens (so that prefixes meet) in a small pool."""

    window: CacheWindow | None = None

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(7, 2, window=self.window, least_kept=1)
        self.content = PoolContent(2, None if self.window is None else self.window.size)
        self.living: list[Sequence] = []
        self.count = 0

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9),
        has_media=st.booleans(),
        adapter=st.sampled_from([None, None, "a", "b"]),
    )
    def arrive(self, tokens: list[int], has_media: bool, adapter: str | None) -> None:
        """With media, the tokens are all alike and only their content tells them apart."""
        self.count += 1
        content = [token + (token << 90) for token in tokens] if has_media else None
        self.living.append(make_sequence([1] * len(tokens) if has_media else tokens, self.count, content, adapter))

    @precondition(lambda self: self.living)
    @rule(data=st.data())
    def allocate(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.living))
        if sequence.cache_state is CacheState.UNALLOCATED and self.blocks.can_admit(sequence):
            self.blocks.allocate(sequence)
            assert sequence.num_computed_tokens < sequence.num_tokens
            chunk = sequence.num_uncomputed_tokens
            if self.window is not None:
                chunk = min(chunk, self.window.max_chunk)
            end = sequence.num_computed_tokens + chunk
            assert self.blocks.can_grow(sequence, end), "what can be admitted must fit"

    @precondition(lambda self: self.living)
    @rule(data=st.data(), written=st.integers(0, 1))
    def compute(self, data: st.DataObject, written: int) -> None:
        sequence = data.draw(st.sampled_from(self.living))
        if sequence.cache_state is not CacheState.ALLOCATED:
            return
        if sequence.num_uncomputed_tokens == 0:
            sequence.append(written)
        most = sequence.num_uncomputed_tokens
        if self.window is not None:
            most = min(most, self.window.max_chunk)
        end = sequence.num_computed_tokens + data.draw(st.integers(1, most))
        if self.blocks.can_grow(sequence, end):
            self.blocks.grow(sequence, end)
            self.content.compute(sequence, sequence.num_computed_tokens, end)
            sequence.num_computed_tokens = end
            self.blocks.commit(sequence)

    @precondition(lambda self: self.living)
    @rule(data=st.data(), for_good=st.booleans())
    def leave(self, data: st.DataObject, for_good: bool) -> None:
        sequence = data.draw(st.sampled_from(self.living))
        if for_good:
            self.blocks.free(sequence)
            self.living.remove(sequence)
        elif sequence.cache_state is CacheState.ALLOCATED:
            self.blocks.preempt(sequence)

    @invariant()
    def tables_hold_what_they_promise(self) -> None:
        self.blocks.check_integrity(self.living)
        for sequence in self.living:
            self.content.check(sequence, sequence.num_computed_tokens)

    def teardown(self) -> None:
        for sequence in self.living:
            self.blocks.free(sequence)
        self.blocks.check_integrity([])
        assert self.blocks.num_free_blocks == 7


TestRandomLives = BlockManagerMachine.TestCase
TestRandomLives.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


class WindowMachine(BlockManagerMachine):
    """The same, where tokens see three tokens."""

    window = CacheWindow(size=3, max_chunk=4)


class NarrowMachine(BlockManagerMachine):
    """The same, where tokens see themselves alone."""

    window = CacheWindow(size=1, max_chunk=2)


TestRandomWindowedLives = WindowMachine.TestCase
TestRandomWindowedLives.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestRandomNarrowLives = NarrowMachine.TestCase
TestRandomNarrowLives.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


def test_a_commit_looks_at_new_blocks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token of a long text is one: they must not cost more and more."""
    blocks = BlockManager(16, SIZE)
    sequence = compute_all(blocks, make_sequence(list(range(10 * SIZE))))
    looked_at: list[int] = []
    content = blocks._content
    monkeypatch.setattr(blocks, "_content", lambda s, index: looked_at.append(index) or content(s, index))
    for token in range(SIZE):
        sequence.append(token)
        blocks.grow(sequence, sequence.num_tokens)
        sequence.num_computed_tokens = sequence.num_tokens
        blocks.commit(sequence)
    assert set(looked_at) == {10}
    blocks.check_integrity([sequence])
