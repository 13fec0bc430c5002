"""Continuous batching without a model: what runs when, under which budget, and no block lost or mixed up."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.pool_content import PoolContent

from vllm_omni.core.ar.block_manager import BlockManager
from vllm_omni.core.ar.cache_window import CacheWindow
from vllm_omni.core.ar.prompt_lookup import PromptLookup
from vllm_omni.core.ar.scheduler import ARScheduler, Chunk
from vllm_omni.core.ar.sequence import Sequence, SequenceStatus
from vllm_omni.errors import CacheError, ResourceError


class Simulation:
    """A scheduler, a pool and a model whose next token depends on all tokens before it, computed one step at a time."""

    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 4,
        max_num_seqs: int = 8,
        budget: int = 16,
        window: int | None = None,
        lookup: PromptLookup | None = None,
    ) -> None:
        cache_window = None if window is None else CacheWindow(window, budget)
        self.blocks = BlockManager(num_blocks, block_size, window=cache_window)
        self.scheduler = ARScheduler(self.blocks, max_num_seqs, budget, lookup)
        self.content = PoolContent(block_size, window)
        self.max_num_seqs, self.budget = max_num_seqs, budget
        self.living: list[Sequence] = []
        self.count = 0

    def add(
        self, prompt: list[int], num_new: int = 4, is_writing: bool = True, num_ready: int | None = None
    ) -> Sequence:
        self.count += 1
        room = len(prompt) + (num_new if is_writing else 0)
        sequence = Sequence(self.count, f"r{self.count}", list(prompt), max_tokens=room, is_writing=is_writing)
        sequence.num_ready_tokens = num_ready
        self.scheduler.add(sequence)
        self.living.append(sequence)
        return sequence

    def step(self) -> list[Chunk]:
        has_work = self.scheduler.has_work()
        chunks = self.scheduler.schedule()
        # the prefix cache may serve all that is ready, and then there is no work any more
        assert bool(chunks) == has_work or not (chunks or self.scheduler.has_work()), "work to do must be done"
        self.check_limits(chunks)
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.token_ids += chunk.draft
            self.content.compute(sequence, chunk.start, chunk.end)
            del sequence.token_ids[sequence.num_tokens - len(chunk.draft) :]
            self.scheduler.advance(chunk)
            if chunk.samples:
                self.write(chunk)
            if not sequence.is_writing and sequence.num_uncomputed_tokens == 0:
                self.end(sequence)
            else:
                self.scheduler.settle(chunk)
                self.content.check(sequence, sequence.num_computed_tokens)
        self.scheduler.check_integrity()
        return chunks

    def write(self, chunk: Chunk) -> None:
        """One token, and further ones behind what the draft has right."""
        sequence = chunk.sequence
        for index, drafted in enumerate((*chunk.draft, None)):
            if index:
                self.scheduler.accept(sequence)
            sequence.append(next_token(sequence.token_ids))
            sequence.is_writing = sequence.num_tokens < sequence.max_tokens
            if sequence.token_ids[-1] != drafted or not sequence.is_writing:
                return

    def check_limits(self, chunks: list[Chunk]) -> None:
        assert sum(chunk.num_tokens for chunk in chunks) <= self.budget
        assert sum(1 + len(chunk.draft) for chunk in chunks) <= self.max_num_seqs
        assert all(chunk.end < chunk.sequence.max_tokens for chunk in chunks if chunk.draft)
        assert len({chunk.sequence.sequence_id for chunk in chunks}) == len(chunks)
        assert all(chunk.num_tokens > 0 and chunk.start == chunk.sequence.position for chunk in chunks)
        assert all(chunk.end <= (chunk.sequence.num_ready_tokens or chunk.end) for chunk in chunks)
        assert not any(chunk.sequence.is_paused for chunk in chunks)

    def end(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        self.living.remove(sequence)

    def release(self) -> None:
        """Everything is there and nobody is paused."""
        for sequence in self.living:
            sequence.num_ready_tokens, sequence.is_paused = None, False

    def drain(self) -> None:
        for _ in range(2000):
            if not self.scheduler.has_work():
                break
            self.step()
        assert not self.scheduler.has_work()
        assert self.blocks.num_free_blocks == self.blocks.num_blocks


def next_token(tokens: list[int]) -> int:
    """What a sequence writes: mostly it repeats itself."""
    chance = hash(tuple(tokens))
    return tokens[-2] if len(tokens) > 1 and chance % 4 else chance % 3


def test_a_long_prompt_is_computed_in_chunks_while_others_write() -> None:
    simulation = Simulation(budget=6)
    writer = simulation.add([1, 2], num_new=20)
    simulation.step()
    reader = simulation.add(list(range(23)))
    shares = [{chunk.sequence.sequence_id: chunk.num_tokens for chunk in simulation.step()} for _ in range(5)]
    assert [share[writer.sequence_id] for share in shares] == [1] * 5
    assert [share[reader.sequence_id] for share in shares] == [5, 5, 5, 5, 3]
    simulation.drain()


def test_only_the_last_chunk_of_a_prompt_samples() -> None:
    simulation = Simulation(budget=4)
    simulation.add(list(range(10)), num_new=1)
    assert [simulation.step()[0].samples for _ in range(3)] == [False, False, True]


def test_an_encoded_prompt_never_samples() -> None:
    simulation = Simulation(budget=4)
    simulation.add(list(range(10)), is_writing=False)
    assert [simulation.step()[0].samples for _ in range(3)] == [False, False, False]
    assert not simulation.scheduler.has_work()


def test_the_newest_is_preempted_first_and_comes_back_with_its_prefix() -> None:
    simulation = Simulation(num_blocks=6, block_size=4)
    old = simulation.add([1] * 7, num_new=12)
    new = simulation.add([2] * 8, num_new=8)
    while new.num_preemptions == 0:
        simulation.step()
    assert old.num_preemptions == 0
    assert new.status is SequenceStatus.WAITING
    simulation.drain()
    assert (old.num_tokens, new.num_tokens) == (19, 16)


def test_what_is_preempted_resumes_from_what_is_still_cached() -> None:
    simulation = Simulation(num_blocks=9, block_size=4)
    old = simulation.add([1] * 7, num_new=1)
    new = simulation.add([2] * 12, num_new=4)
    simulation.step()
    simulation.scheduler._preempt(new)
    chunk = next(c for c in simulation.step() if c.sequence is new)
    assert chunk.start > 0
    assert new.num_cached_tokens == 0, "hits on its own blocks are no hits of the prompt"
    simulation.drain()
    assert old.is_finished and new.is_finished


def test_more_writers_than_budget_take_turns_without_loss() -> None:
    simulation = Simulation(budget=3)
    writers = [simulation.add([number], num_new=5) for number in range(5)]
    simulation.drain()
    assert [writer.num_tokens for writer in writers] == [6] * 5


def test_a_sequence_that_can_never_fit_is_refused_at_once() -> None:
    simulation = Simulation(num_blocks=2, block_size=4)
    with pytest.raises(ResourceError, match="got 9 tokens, expected at most 8"):
        simulation.add([1] * 5, num_new=4)
    simulation.add([1] * 5, num_new=3)
    simulation.drain()


def test_first_come_first_served() -> None:
    simulation = Simulation(num_blocks=4, block_size=4, max_num_seqs=4, budget=64)
    first = simulation.add([1] * 9, num_new=1)
    big = simulation.add([2] * 9, num_new=1)
    small = simulation.add([3], num_new=1)
    assert [chunk.sequence for chunk in simulation.step()] == [first]
    assert small.status is big.status is SequenceStatus.WAITING, "the small one does not overtake"
    simulation.drain()


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_removing_frees_all_blocks_wherever_the_sequence_stands(steps: int) -> None:
    simulation = Simulation(budget=4)
    sequences = [simulation.add([number] * 9, num_new=4) for number in range(3)]
    for _ in range(steps):
        simulation.step()
    for sequence in sequences:
        simulation.end(sequence)
        simulation.scheduler.remove(sequence)  # once more is fine
        simulation.scheduler.check_integrity()
    assert simulation.blocks.num_free_blocks == simulation.blocks.num_blocks
    assert not simulation.scheduler.has_work()


def test_a_chunk_advances_once() -> None:
    simulation = Simulation()
    simulation.add([1, 2, 3], num_new=2)
    chunk = simulation.scheduler.schedule()[0]
    simulation.scheduler.advance(chunk)
    with pytest.raises(CacheError, match="from token 0"):
        simulation.scheduler.advance(chunk)


def test_nothing_is_computed_before_it_is_ready() -> None:
    simulation = Simulation()
    sequence = simulation.add(list(range(6)), num_new=3, num_ready=4)
    chunk = simulation.step()[0]
    assert (chunk.start, chunk.end, chunk.samples) == (0, 4, False)
    assert not simulation.scheduler.has_work() and simulation.step() == []
    assert len(sequence.block_table) == 1, "it keeps its blocks"
    sequence.num_ready_tokens = 6
    assert [(chunk.start, chunk.end, chunk.samples) for chunk in simulation.step()] == [(4, 6, True)]
    assert not simulation.scheduler.has_work(), "the written token waits for its input"
    simulation.release()
    simulation.drain()


def test_a_paused_sequence_keeps_its_blocks_and_others_overtake_it() -> None:
    simulation = Simulation()
    first, second = simulation.add([1] * 5, num_new=8), simulation.add([2] * 5, num_new=8)
    simulation.step()
    first.is_paused = True
    held = list(first.block_table)
    while not second.is_finished:
        assert [chunk.sequence for chunk in simulation.step()] == [second]
    assert first.block_table == held and not simulation.scheduler.has_work()
    first.is_paused = False
    simulation.drain()


@pytest.mark.parametrize("is_paused", [True, False])
def test_what_waits_is_preempted_by_an_older_one_that_lacks_blocks(is_paused: bool) -> None:
    simulation = Simulation(num_blocks=4, block_size=4)
    old, idle = simulation.add([1] * 7, num_new=9), simulation.add([2] * 8, num_new=1)
    idle.num_ready_tokens, idle.is_paused = 5, is_paused
    while not old.is_finished:
        assert simulation.step()[0].sequence is old
    assert (old.num_preemptions, idle.num_preemptions) == (0, 0 if is_paused else 1)
    simulation.release()
    simulation.drain()


def test_an_idle_one_gives_way_when_nothing_else_could_run_even_to_a_younger_one() -> None:
    simulation = Simulation(num_blocks=4, block_size=4, max_num_seqs=1)
    idle = simulation.add([1] * 12, num_new=4, num_ready=12)
    simulation.step()
    young = simulation.add([2] * 8, num_new=2)
    for _ in range(3):
        assert [chunk.sequence for chunk in simulation.step()] == [young]
    assert idle.num_preemptions == 1 and young.is_finished
    simulation.release()
    simulation.drain()
    assert idle.num_tokens == 16


def test_with_a_window_sequences_run_that_are_longer_than_the_pool() -> None:
    simulation = Simulation(num_blocks=6, block_size=4, budget=8, window=6)
    long = simulation.add(list(range(50)), num_new=100)
    others = [simulation.add([number] * 9, num_new=60) for number in range(3)]
    simulation.drain()
    assert long.num_tokens == 150 and all(other.num_tokens == 69 for other in others)
    with pytest.raises(ResourceError, match="got 40 tokens, expected at most 8"):
        Simulation(num_blocks=2, block_size=4, budget=8, window=6).add([1] * 30, num_new=10)


def simulate_copying(**sizes: int) -> Simulation:
    """One sequence that has begun to repeat itself, and drafts."""
    simulation = Simulation(lookup=PromptLookup(4, 1, 2), **sizes)
    simulation.add([0, 1] * 4, num_new=40)
    return simulation


def test_drafts_give_the_same_tokens_in_fewer_steps() -> None:
    plain, drafting = Simulation(), simulate_copying()
    expected = plain.add([0, 1] * 4, num_new=40)
    (sequence,) = drafting.living
    steps = [0, 0]
    for index, simulation in enumerate((plain, drafting)):
        while simulation.scheduler.has_work():
            simulation.step()
            steps[index] += 1
    assert sequence.token_ids == expected.token_ids
    assert 0 < sequence.num_accepted_tokens == steps[0] - steps[1] < sequence.num_drafted_tokens
    scheduler = drafting.scheduler
    assert scheduler.num_accepted_tokens == sequence.num_accepted_tokens
    assert scheduler.num_drafted_tokens == sequence.num_drafted_tokens


def test_a_draft_takes_no_row_no_token_and_no_block_of_another_sequence() -> None:
    crowded = simulate_copying(max_num_seqs=3, budget=64)
    others = [crowded.add([number], num_new=30) for number in range(5, 7)]
    crowded.step()
    assert [len(chunk.draft) for chunk in crowded.step()] == [0, 0, 0]
    for other in others:
        crowded.end(other)
    assert [len(chunk.draft) for chunk in crowded.step()] == [2]
    tight = simulate_copying(num_blocks=12, max_num_seqs=16)
    other = tight.add([7] * 9, num_new=27)
    while tight.living:
        tight.step()
    assert other.num_preemptions <= 1, "no more than without drafts"


def test_blocks_of_a_draft_that_was_wrong_are_given_back() -> None:
    simulation = Simulation(block_size=1, lookup=PromptLookup(4, 1, 2))
    sequence = simulation.add([0, 1] * 4, num_new=40)
    (chunk,) = simulation.scheduler.schedule()
    assert len(chunk.draft) == 4 and len(sequence.block_table) == 12
    before = sequence.block_table
    simulation.scheduler.advance(chunk)
    sequence.append(2)
    simulation.scheduler.settle(chunk)
    assert len(sequence.block_table) == 9 and simulation.blocks.num_free_blocks == 64 - 9
    assert sequence.block_table is not before, "who keeps a copy of the table must see that it is another"
    simulation.scheduler.check_integrity()


class SchedulerMachine(RuleBasedStateMachine):
    """Random arrivals, steps and aborts in pools so small that preemption is usual."""

    num_blocks, window = 6, None

    def __init__(self) -> None:
        super().__init__()
        self.simulation = Simulation(
            num_blocks=self.num_blocks,
            block_size=2,
            max_num_seqs=4,
            budget=5,
            window=self.window,
            lookup=self.lookup(),
        )

    def lookup(self) -> PromptLookup | None:
        return None

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=8),
        num_new=st.integers(1, 4),
        is_writing=st.booleans(),
        num_ready=st.none() | st.integers(0, 8),
    )
    def arrive(self, prompt: list[int], num_new: int, is_writing: bool, num_ready: int | None) -> None:
        self.simulation.add(prompt, num_new, is_writing, num_ready)

    @precondition(lambda self: self.simulation.living)
    @rule(data=st.data(), more=st.none() | st.integers(1, 3))
    def supply(self, data: st.DataObject, more: int | None) -> None:
        """Further inputs of a sequence come, or all of them."""
        sequence = data.draw(st.sampled_from(self.simulation.living))
        if sequence.num_ready_tokens is not None:
            sequence.num_ready_tokens = None if more is None else sequence.num_ready_tokens + more

    @precondition(lambda self: self.simulation.living)
    @rule(data=st.data())
    def pause_or_resume(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.simulation.living))
        sequence.is_paused = not sequence.is_paused

    @rule(count=st.integers(1, 4))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.simulation.step()

    @precondition(lambda self: self.simulation.living)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.simulation.end(data.draw(st.sampled_from(self.simulation.living)))

    @invariant()
    def is_sound(self) -> None:
        self.simulation.scheduler.check_integrity()

    def teardown(self) -> None:
        self.simulation.release()
        self.simulation.drain()
        assert not self.simulation.living


TestRandomArrivals = SchedulerMachine.TestCase
TestRandomArrivals.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


class SpeculatingMachine(SchedulerMachine):
    """The same, with drafts."""

    def lookup(self) -> PromptLookup:
        return PromptLookup(3, 1, 2)


TestRandomDrafts = SpeculatingMachine.TestCase
TestRandomDrafts.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


class WindowMachine(SchedulerMachine):
    """The same, where tokens see three tokens, and no sequence but the shortest fits whole."""

    num_blocks, window = 5, 3  # as many as one sequence holds at once


class WindowedSpeculatingMachine(WindowMachine, SpeculatingMachine):
    """With both."""


TestRandomWindowedDrafts = WindowedSpeculatingMachine.TestCase
TestRandomWindowedDrafts.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)

TestRandomWindowedArrivals = WindowMachine.TestCase
TestRandomWindowedArrivals.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
