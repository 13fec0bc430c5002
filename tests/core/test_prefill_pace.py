"""Steps with prompts are as long as running texts may wait, and whole prompts where nobody waits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm_omni.core.ar.block_manager import BlockManager
from vllm_omni.core.ar.prefill_pace import LEAST_TOKENS, PrefillPace
from vllm_omni.core.ar.scheduler import ARScheduler
from vllm_omni.core.ar.sequence import Sequence

WAIT_S = 0.1


class Machine:
    """A scheduler and a model of which only the time is known: of a step, `fixed_s` and `token_s` a token."""

    def __init__(self, fixed_s: float, token_s: float, max_wait_s: float | None = WAIT_S) -> None:
        pace = None if max_wait_s is None else PrefillPace(max_wait_s)
        self.scheduler = ARScheduler(BlockManager(2000, 4), 8, 2048, pace=pace)
        self.fixed_s, self.token_s = fixed_s, token_s
        self.count = 0

    def add(self, num_prompt: int, num_new: int = 400, is_watched: bool = True) -> Sequence:
        self.count += 1
        prompt = [self.count + index for index in range(num_prompt)]
        most = num_prompt + num_new
        sequence = Sequence(self.count, f"r{self.count}", prompt, max_tokens=most, is_watched=is_watched)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> tuple[dict[int, int], float]:
        """Tokens by sequence, and seconds."""
        chunks = self.scheduler.schedule()
        step_s = self.fixed_s + self.token_s * sum(chunk.num_tokens for chunk in chunks)
        self.scheduler.learn(chunks, step_s)
        for chunk in chunks:
            self.scheduler.advance(chunk)
            if chunk.samples:
                chunk.sequence.append(7)
        self.scheduler.check_integrity()
        return {chunk.sequence.sequence_id: chunk.num_tokens for chunk in chunks}, step_s


def test_a_prompt_beside_a_running_text_comes_in_steps_as_long_as_that_may_wait() -> None:
    machine = Machine(fixed_s=0.02, token_s=0.001)
    writer = machine.add(10)
    machine.step()
    reader = machine.add(1500)
    steps = []
    while reader.num_computed_tokens < 1500:
        shares, step_s = machine.step()
        assert shares[writer.sequence_id] == 1
        steps.append(step_s)
    assert max(steps) <= WAIT_S * 1.01
    assert sum(steps) / len(steps) > 0.8 * WAIT_S, "and hardly shorter"


def test_without_a_running_text_chunks_are_whole_and_so_are_they_without_a_pace() -> None:
    alone = Machine(0.02, 0.001)
    alone.add(5000)
    assert [next(iter(alone.step()[0].values())) for _ in range(2)] == [2048, 2048]
    free = Machine(0.02, 0.001, max_wait_s=None)
    free.add(10)
    free.step()
    reader = free.add(3000)
    assert free.step()[0][reader.sequence_id] == 2047


def test_paused_texts_do_not_wait() -> None:
    machine = Machine(0.02, 0.001)
    writer = machine.add(10)
    machine.step()
    writer.is_paused = True
    reader = machine.add(1500)
    assert machine.step()[0] == {reader.sequence_id: 1500}


def test_texts_that_nobody_reads_along_wait_and_one_that_is_read_holds_back_the_prompts_beside_all() -> None:
    machine = Machine(0.0, 0.001)
    machine.add(10, is_watched=False)
    machine.step()
    reader = machine.add(300, is_watched=False)
    assert machine.step()[0][reader.sequence_id] == 300
    machine.add(10)
    machine.step()
    reader = machine.add(300, is_watched=False)
    assert machine.step()[0][reader.sequence_id] == 100 - 3


def test_a_prompt_goes_on_though_steps_are_too_long_without_it() -> None:
    machine = Machine(fixed_s=1.0, token_s=0.01)
    machine.add(100)
    machine.step()
    reader = machine.add(50)
    assert [machine.step()[0][reader.sequence_id] for _ in range(4)] == [LEAST_TOKENS] * 3 + [2]


def test_all_prompts_of_a_step_share_what_it_may_take_in_their_order() -> None:
    machine = Machine(0.0, 0.001)
    machine.add(100)
    machine.step()
    first, second, third = machine.add(60), machine.add(300), machine.add(50)
    shares, _ = machine.step()
    assert (shares[first.sequence_id], shares[second.sequence_id]) == (60, 39)
    assert third.sequence_id not in shares
    for _ in range(8):
        shares, step_s = machine.step()
        assert step_s <= WAIT_S * 1.001
    assert set(shares) == {1, 2, 3, 4}


@given(
    speeds=st.lists(st.floats(1e-5, 1e-2), min_size=30, max_size=60),
    fixed_s=st.floats(0, 0.05),
)
def test_a_machine_whose_speed_changes_is_followed(speeds: list[float], fixed_s: float) -> None:
    """A step takes too long by no more than the speed has fallen, and soon fits again."""
    pace = PrefillPace(WAIT_S)
    pace.learn(100, fixed_s + 100 * speeds[0])
    for token_s in speeds:
        num_tokens = pace.prompt_tokens(1)
        assert num_tokens is not None and num_tokens >= LEAST_TOKENS
        pace.learn(num_tokens + 1, fixed_s + token_s * (num_tokens + 1))
    for _ in range(40):
        num_tokens = pace.prompt_tokens(1) or 0
        pace.learn(num_tokens + 1, fixed_s + speeds[-1] * (num_tokens + 1))
    assert num_tokens == LEAST_TOKENS or fixed_s + speeds[-1] * (num_tokens + 1) <= WAIT_S * 1.05
