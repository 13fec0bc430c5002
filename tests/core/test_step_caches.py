"""The step caches' rows: what they decide, what they predict, what they hold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers.hooks.mag_cache import nearest_interp
from diffusers.hooks.taylorseer_cache import TaylorSeerState
from hypothesis import given
from hypothesis import strategies as st

from vllm_omni import registry
from vllm_omni.core.diffusion.caches.base import RowCache, StepCachePolicy
from vllm_omni.core.diffusion.caches.dbcache import DBCache, DBCacheOptions
from vllm_omni.core.diffusion.caches.first_block import FirstBlockCache, FirstBlockOptions, FirstBlockRow
from vllm_omni.core.diffusion.caches.magcache import MagCache, MagCacheOptions, nearest
from vllm_omni.core.diffusion.caches.none import NoCache, NoCacheOptions
from vllm_omni.core.diffusion.caches.recording import Recording, RecordingOptions
from vllm_omni.core.diffusion.caches.taylorseer import TaylorSeer, TaylorSeerOptions
from vllm_omni.core.diffusion.caches.teacache import TeaCache, TeaCacheOptions
from vllm_omni.errors import CacheError, ConfigError, InvalidRequestError


def first_block(threshold: float = 0.08) -> RowCache:
    return FirstBlockCache(FirstBlockOptions(threshold)).new_row(10)


def decision(row: RowCache, step: int, signal: torch.Tensor | None) -> tuple[bool, list[float]]:
    measured = row.measure(step, signal)
    numbers = [] if measured is None else measured.tolist()
    return row.decides_to_reuse(step, numbers), numbers


def compute(row: RowCache, step: int, signal: torch.Tensor | None, rest: torch.Tensor) -> None:
    row.update(step, signal, decision(row, step, signal)[1], rest)


def test_first_block_compares_with_the_last_computed_step() -> None:
    """Small changes add up: 1.00 -> 1.06 -> 1.12 is within 8% step by step, but not from the last computed one."""
    row, rest = first_block(), torch.full((2, 3), 7.0)
    assert not decision(row, 0, torch.ones(2, 3))[0]
    compute(row, 0, torch.ones(2, 3), rest)
    small = torch.full((2, 3), 1.06)
    is_reused, measured = decision(row, 1, small)
    assert is_reused and row.predict(1) is rest
    row.note_reuse(1, small, measured)
    assert not decision(row, 2, torch.full((2, 3), 1.12))[0]


def test_first_block_threshold_is_inclusive_and_zero_never_reuses_a_change() -> None:
    row = first_block(0.0)
    compute(row, 0, torch.ones(4, 1), torch.ones(4, 1))
    assert decision(row, 1, torch.ones(4, 1))[0]
    assert not decision(row, 1, torch.ones(4, 1) + 1e-3)[0]


def test_first_block_of_a_dead_block_is_always_computed() -> None:
    row = first_block()
    compute(row, 0, torch.zeros(3, 1), torch.ones(3, 1))
    assert not decision(row, 1, torch.zeros(3, 1))[0]


def test_asking_changes_nothing() -> None:
    """A batch that failed is tried again: the decision must be the same."""
    row = first_block()
    compute(row, 0, torch.ones(2, 3), torch.ones(2, 3))
    for _ in range(3):
        assert decision(row, 1, torch.full((2, 3), 1.06))[0] and not decision(row, 1, torch.full((2, 3), 1.2))[0]


def schedule(row: RowCache, num_steps: int) -> list[int]:
    """The steps that are computed, of rows that measure nothing."""
    computed = []
    for step in range(num_steps):
        if row.decides_to_reuse(step, ()):
            row.note_reuse(step, None, ())
        else:
            computed.append(step)
            row.update(step, None, (), torch.ones(2, 2))
    return computed


@given(st.integers(0, 4), st.integers(1, 6), st.integers(1, 5), st.integers(0, 10_000))
def test_taylorseer_is_exact_for_polynomials_of_its_order(order: int, interval: int, warmup: int, seed: int) -> None:
    warmup = max(warmup, order + 1)
    row = TaylorSeer(TaylorSeerOptions(interval, warmup, order)).new_row(30)
    coefficients = torch.randn(order + 1, 5, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for step in range(30):
        rest = sum((c * (step / 10) ** power for power, c in enumerate(coefficients)), torch.zeros(5, 3).double())
        if row.decides_to_reuse(step, ()):
            torch.testing.assert_close(row.predict(step), rest, rtol=1e-7, atol=1e-7)
        else:
            row.update(step, None, (), rest)


@pytest.mark.parametrize("interval, warmup", [(5, 3), (2, 1), (3, 4), (1, 2)])
def test_taylorseer_of_order_1_is_the_reference_s(interval: int, warmup: int) -> None:
    """diffusers' state over the same schedule, which its hook writes as below."""
    row = TaylorSeer(TaylorSeerOptions(interval, warmup)).new_row(20)
    reference = TaylorSeerState(taylor_factors_dtype=torch.float32, max_order=1)
    for step in range(20):
        is_computed = step < warmup or (step - warmup - 1) % interval == 0
        assert row.decides_to_reuse(step, ()) is not is_computed
        reference.current_step = step
        if is_computed:
            rest = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            reference.update((rest,))
            row.update(step, None, (), rest)
        else:
            torch.testing.assert_close(row.predict(step), reference.predict()[0])


def test_taylorseer_of_interval_1_computes_every_step_and_order_0_replays() -> None:
    assert schedule(TaylorSeer(TaylorSeerOptions(interval=1)).new_row(9), 9) == list(range(9))
    replaying = TaylorSeer(TaylorSeerOptions(order=0))
    assert schedule(replaying.new_row(11), 11) == [0, 1, 2, 4, 9]
    row = replaying.new_row(9)
    rests = [torch.randn(2, 2) for _ in range(3)]
    for step, rest in enumerate(rests):
        row.update(step, None, (), rest)
    assert row.predict(3) is rests[2]


def test_taylorseer_of_a_branch_that_begins_late_computes_its_first_step() -> None:
    row = TaylorSeer(TaylorSeerOptions()).new_row(20)
    assert row.decides_to_reuse(5, ()) is False, "a step that it would replay, if there were anything"
    row.update(5, None, (), torch.ones(2, 2))
    assert row.decides_to_reuse(6, ())


def teacache(threshold: float, *coefficients: float, num_steps: int = 10) -> RowCache:
    options = TeaCacheOptions(threshold, coefficients, "a model", num_steps)
    return TeaCache(options).new_row(num_steps)


def steps_of(row: RowCache, signals: list[float]) -> list[int]:
    """The steps that are computed, of rows whose signal is everywhere the same number."""
    computed = []
    for step, value in enumerate(signals):
        signal = torch.full((2, 3), value)
        is_reused, measured = decision(row, step, signal)
        if is_reused:
            row.note_reuse(step, signal, measured)
        else:
            computed.append(step)
            row.update(step, signal, measured, torch.ones(2, 3))
    return computed


def test_teacache_adds_up_what_the_polynomial_makes_of_each_step_s_change() -> None:
    """Changes of 10% a step, from step to step; 2 d + 0.1 makes 0.3 of each: below 0.7 two steps are replayed."""
    signals = [1.1**step for step in range(10)]
    assert steps_of(teacache(0.7, 2.0, 0.1), signals) == [0, 3, 6, 9]
    assert steps_of(teacache(0.7, 2.0, 0.1, num_steps=9), signals[:9]) == [0, 3, 6, 8], "the last step too"
    assert steps_of(teacache(100.0, 1.0, 0.0), signals) == [0, 9]
    assert steps_of(teacache(0.0, 2.0, 0.1), signals) == list(range(10))


def test_teacache_takes_a_polynomial_below_zero_for_zero_and_an_input_of_zeros_for_a_change() -> None:
    assert steps_of(teacache(0.0, 1.0, -5.0), [1.0] * 10) == list(range(10)), "no negative sum is below 0"
    assert steps_of(teacache(0.5, 1.0, -5.0), [1.0, 1.1, 9.0, 9.0]) == [0, 2], "and none makes up for a later change"
    assert steps_of(teacache(100.0, 1.0, 0.0), [0.0, 0.0, 0.0, 1.0]) == [0, 1, 2, 3]


def magcache(ratios: list[float], num_steps: int = 10, **options: float) -> RowCache:
    return MagCache(MagCacheOptions(ratios=tuple(ratios), fitted_on="a model", **options)).new_row(num_steps)  # type: ignore[arg-type]


@given(
    st.lists(st.floats(0.8, 1.25), min_size=2, max_size=20),
    st.integers(1, 40),
    st.floats(0.001, 1.0),
    st.integers(0, 5),
    st.floats(0, 1),
)
def test_magcache_skips_what_the_reference_s_rule_skips(
    ratios: list[float], num_steps: int, threshold: float, max_skips: int, first: float
) -> None:
    """The rule as the paper writes it: product, error and count of the steps since the last computed one."""
    row = magcache(ratios, num_steps, threshold=threshold, max_skips=max_skips, warmup_fraction=first)
    used = nearest_interp(torch.tensor(ratios, dtype=torch.float64), num_steps).tolist()
    product, error, count = 1.0, 0.0, 0
    for step in range(num_steps):
        expected = False
        if step >= int(first * num_steps + 0.5):
            product, count = product * used[step], count + 1
            error += abs(1.0 - product)
            expected = step > 0 and error <= threshold and count <= max_skips
        assert row.decides_to_reuse(step, ()) is expected
        if expected:
            row.note_reuse(step, None, ())
        else:
            row.update(step, None, (), torch.ones(2, 2))
            product, error, count = 1.0, 0.0, 0


@given(st.lists(st.floats(0.5, 2.0), min_size=1, max_size=60), st.integers(1, 60))
def test_magcache_takes_the_ratios_for_another_number_of_steps_as_the_reference_does(
    ratios: list[float], num_steps: int
) -> None:
    assert nearest(ratios, num_steps) == nearest_interp(torch.tensor(ratios, dtype=torch.float64), num_steps).tolist()


def test_magcache_of_threshold_0_computes_every_step_even_where_the_ratio_is_1() -> None:
    assert schedule(magcache([1.0] * 10, threshold=0.0), 10) == list(range(10))


def test_dbcache_replays_no_more_steps_in_a_row_than_it_may() -> None:
    row = DBCache(DBCacheOptions(threshold=0.1, max_skips=2)).new_row(10)
    assert steps_of(row, [1.0] * 8) == [0, 3, 6]
    assert steps_of(DBCache(DBCacheOptions(threshold=0.1)).new_row(10), [1.0] * 8) == [0]
    assert steps_of(DBCache(DBCacheOptions(max_skips=0)).new_row(10), [1.0] * 4) == [0, 1, 2, 3]


def test_recording_computes_every_step_and_notes_each_against_the_one_before() -> None:
    policy = Recording(RecordingOptions(signal="modulated_input"))
    row = policy.new_row(3)
    for step, (signal, rest) in enumerate([(1.0, 1.0), (1.1, 3.0), (1.1, 1.5)]):
        assert not row.decides_to_reuse(step, ())
        row.update(step, torch.full((2, 3), signal), (), torch.full((2, 3), rest))
    first, second = policy.records
    assert (first.step, second.step) == (1, 2)
    assert first.input_change == pytest.approx(0.1) and second.input_change == 0
    assert (first.residual_change, second.residual_change) == pytest.approx((2.0, 0.5))
    assert (first.magnitude_ratio, second.magnitude_ratio) == pytest.approx((3.0, 0.5))


@given(st.sampled_from([0, 1, 3]), st.integers(1, 12))
def test_a_row_never_holds_more_than_it_is_planned_for(order: int, num_steps: int) -> None:
    policies: list[StepCachePolicy] = [
        FirstBlockCache(FirstBlockOptions()),
        TaylorSeer(TaylorSeerOptions(interval=1, order=order)),
        TeaCache(TeaCacheOptions(coefficients=(1.0, 0.0), fitted_on="a model", fitted_steps=3)),
        MagCache(MagCacheOptions(ratios=(1.0,), fitted_on="a model")),
        DBCache(DBCacheOptions()),
        Recording(RecordingOptions(signal="modulated_input")),
    ]
    for policy in policies:
        row, most = policy.new_row(num_steps), 0
        for step in range(num_steps):
            compute(row, step, torch.randn(6, 4), torch.randn(6, 4))
            assert row.num_bytes <= policy.row_bytes(6, 4 * 4)
            most = max(most, row.num_bytes)
        assert most > 0


def test_no_cache_keeps_nothing() -> None:
    policy = NoCache(NoCacheOptions())
    assert policy.row_bytes(100, 100) == 0 and policy.computes_all
    with pytest.raises(CacheError, match="makes no rows"):
        policy.new_row(3)


CALIBRATED = {"teacache": {"coefficients": (1.0,), "fitted_steps": 9}, "magcache": {"ratios": (1.0,)}}


@pytest.mark.parametrize("name", registry.names("step cache"))
def test_every_policy_names_its_reference_and_has_defaults(name: str) -> None:
    policy = registry.resolve("step cache", name)
    fitted = {**CALIBRATED[name], "fitted_on": "a model"} if name in CALIBRATED else {}
    made = policy(policy.options_type(**fitted))
    assert policy.reference and isinstance(made, StepCachePolicy)
    assert (made.fit is not None) == (name in CALIBRATED)


@pytest.mark.parametrize("name", CALIBRATED)
def test_a_calibrated_policy_without_its_numbers_names_the_command_that_finds_them(name: str) -> None:
    options = registry.resolve("step cache", name).options_type
    key = next(iter(CALIBRATED[name]))
    with pytest.raises(ConfigError, match=rf"^{key}: missing; .*vllm-omni calibrate CONFIG --policy {name}"):
        options()
    with pytest.raises(ConfigError, match=r"^fitted_on: missing; .*belong to one model alone"):
        options(**CALIBRATED[name])


@pytest.mark.parametrize(
    "options, words",
    [
        (lambda: FirstBlockOptions(-0.1), "threshold: got -0.1"),
        (lambda: TaylorSeerOptions(interval=0), "interval: got 0"),
        (lambda: TaylorSeerOptions(warmup_steps=0), "warmup_steps: got 0"),
        (lambda: TaylorSeerOptions(order=-1), "order: got -1"),
        (lambda: TaylorSeerOptions(order=1.5), "order: got 1.5"),  # type: ignore[arg-type]
        (lambda: TeaCacheOptions(-1, (1.0,), "m", 9), "threshold: got -1"),
        (lambda: TeaCacheOptions(0.1, (1.0,) * 11, "m", 9), "coefficients: their number: got 11"),
        (lambda: TeaCacheOptions(0.1, (1.0,), "m"), "fitted_steps: got 0"),
        (lambda: MagCacheOptions(-1.0, ratios=(1.0,), fitted_on="m"), "threshold: got -1"),
        (lambda: MagCacheOptions(max_skips=-1, ratios=(1.0,), fitted_on="m"), "max_skips: got -1"),
        (lambda: MagCacheOptions(warmup_fraction=1.1, ratios=(1.0,), fitted_on="m"), "warmup_fraction: got 1.1"),
        (lambda: MagCacheOptions(ratios=(1.0,) * 1001, fitted_on="m"), "ratios: their number: got 1001"),
        (lambda: DBCacheOptions(lead_blocks=0), "lead_blocks: got 0"),
        (lambda: DBCacheOptions(tail_blocks=-1), "tail_blocks: got -1"),
        (lambda: DBCacheOptions(threshold=-1), "threshold: got -1"),
        (lambda: DBCacheOptions(max_skips=-1), "max_skips: got -1"),
    ],
)
def test_options_out_of_bounds_are_refused(options: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        options()  # type: ignore[operator]


ROWS = (
    lambda: first_block(0.3),
    lambda: TaylorSeer(TaylorSeerOptions(interval=3, warmup_steps=2, order=2)).new_row(10),
)


@pytest.mark.parametrize("new_row", ROWS)
def test_a_row_that_is_given_the_state_of_another_goes_on_as_that(new_row: Callable[[], RowCache]) -> None:
    """From every step on: the same decisions and predictions."""
    tensors = [torch.randn(4, 3, generator=torch.Generator().manual_seed(step)) for step in range(10)]
    signals = [1 + 0.01 * tensor for tensor in tensors]
    for start in range(10):
        rows = [new_row(), new_row()]
        for step in range(10):
            if step == start:
                rows[1].restore(rows[0].state())
            decisions = [decision(row, step, signals[step]) for row in rows if step >= start or row is rows[0]]
            assert all(each == decisions[0] for each in decisions)
            for row in rows[: len(decisions)]:
                is_reused, measured = decisions[0]
                if is_reused:
                    assert torch.equal(row.predict(step), rows[0].predict(step))
                    row.note_reuse(step, signals[step], measured)
                else:
                    row.update(step, signals[step], measured, tensors[step])


def test_a_state_that_is_of_no_such_row_is_refused() -> None:
    row = first_block()
    for state in (
        {},
        {"_lead": None},
        {"_lead": "x", "_rest": None, "_scale": 0.0},
        {**row.state(), "_threshold": 9.0},
    ):
        with pytest.raises(InvalidRequestError):
            row.restore(state)


def test_a_row_that_does_not_say_what_it_keeps_cannot_be_saved() -> None:
    class Silent(FirstBlockRow):
        kept = ()

    with pytest.raises(CacheError, match="the state of a Silent cannot be saved"):
        Silent(0.1).state()
