"""Sampling: every parameter does what it says, on its own row alone, from its own generator."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_omni.errors import StageError
from vllm_omni.layers.sampler import SampledToken, Sampler, SamplingRow
from vllm_omni.params import SamplingParams
from vllm_omni.worker.ar.step_logits import StepLogits

VOCABULARY = 12


def make_row(
    *,
    prompt: tuple[int, ...] = (0,),
    written: tuple[int, ...] = (),
    stops: tuple[int, ...] = (),
    index: int = 0,
    **params: Any,
) -> SamplingRow:
    row = SamplingRow(SamplingParams(**params), prompt, stops, index)
    for token in written:
        row.record(token)
    return row


def sample(
    logits: Tensor, rows: Sequence[SamplingRow], drafts: Sequence[Sequence[int]] = ()
) -> list[list[SampledToken | StageError]]:
    return StepLogits(logits).choose(Sampler(), rows, drafts).sample()


def draw(logits: Tensor, row: SamplingRow) -> SampledToken:
    ((token,),) = sample(logits[None], [row])
    assert isinstance(token, SampledToken)
    return token


def frequencies(logits: Tensor, count: int = 3000, **params: Any) -> Tensor:
    row = make_row(seed=1, **params)
    counts = Counter(draw(logits, row).token_id for _ in range(count))
    return torch.tensor([counts[token] / count for token in range(len(logits))])


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(4)) * 2


def test_temperature_zero_is_the_largest_logit(logits: Tensor) -> None:
    assert draw(logits, make_row(temperature=0)).token_id == int(logits.argmax())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax_of_the_tempered_logits(logits: Tensor, temperature: float) -> None:
    expected = (logits / temperature).softmax(0)
    torch.testing.assert_close(frequencies(logits, temperature=temperature), expected, rtol=0, atol=0.03)


def test_an_unset_temperature_is_one_and_a_tiny_one_is_greedy(logits: Tensor) -> None:
    torch.testing.assert_close(frequencies(logits), logits.softmax(0), rtol=0, atol=0.03)
    assert frequencies(logits, count=50, temperature=1e-300)[logits.argmax()] == 1


def kept(logits: Tensor, **params: Any) -> set[int]:
    """The tokens that are ever drawn from nearly equal logits."""
    return set(frequencies(logits, count=400, **params).nonzero().flatten().tolist())


def test_top_k_keeps_the_k_most_likely_and_zero_is_off() -> None:
    logits = torch.linspace(0.5, 0, VOCABULARY)
    assert kept(logits, top_k=3) == {0, 1, 2}
    assert kept(logits, top_k=1) == {0}
    assert kept(logits, top_k=0) == kept(logits, top_k=10_000) == set(range(VOCABULARY))


def test_top_p_keeps_the_fewest_that_reach_p_and_always_one() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert kept(logits, top_p=0.79) == {0, 1}
    assert kept(logits, top_p=0.81) == {0, 1, 2}
    assert kept(logits, top_p=1e-9) == {0}


def test_top_p_counts_what_top_k_left() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert kept(logits, top_k=2, top_p=0.6) == {0, 1}
    assert kept(logits, top_k=2, top_p=0.5) == {0}


def test_min_p_is_a_share_of_the_largest_probability() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert kept(logits, min_p=0.31) == {0, 1}
    assert kept(logits, min_p=0.29) == {0, 1, 2}


def test_the_repetition_penalty_acts_on_prompt_and_output_whatever_the_sign() -> None:
    logits = torch.tensor([2.0, 1.9, -1.0, 0.5])
    assert draw(logits, make_row(temperature=0, repetition_penalty=1.5, prompt=(0,))).token_id == 1
    assert draw(logits, make_row(temperature=0, repetition_penalty=1.5, prompt=(0,), written=(1,))).token_id == 0
    negative = torch.tensor([-1.0, -1.1])
    assert draw(negative, make_row(temperature=0, repetition_penalty=1.5, prompt=(0,))).token_id == 1


def test_presence_and_frequency_penalties_act_on_the_output_alone() -> None:
    logits = torch.tensor([2.0, 1.5, 0.0])
    assert draw(logits, make_row(temperature=0, presence_penalty=1.0, prompt=(0,))).token_id == 0
    assert draw(logits, make_row(temperature=0, presence_penalty=1.0, written=(0,))).token_id == 1
    assert draw(logits, make_row(temperature=0, presence_penalty=0.4, written=(0, 0, 0))).token_id == 0
    assert draw(logits, make_row(temperature=0, frequency_penalty=0.4, written=(0,))).token_id == 0
    assert draw(logits, make_row(temperature=0, frequency_penalty=0.4, written=(0, 0))).token_id == 1


def test_logit_bias_adds_to_the_logit(logits: Tensor) -> None:
    worst = int(logits.argmin())
    assert draw(logits, make_row(temperature=0, logit_bias={worst: 100.0})).token_id == worst
    best = int(logits.argmax())
    assert draw(logits, make_row(temperature=0, logit_bias={best: -100.0})).token_id != best


def test_ending_tokens_are_suppressed_until_min_tokens_are_written(logits: Tensor) -> None:
    best = int(logits.argmax())
    assert draw(logits, make_row(temperature=0, min_tokens=2, stops=(best,), written=(1,))).token_id != best
    assert draw(logits, make_row(temperature=0, min_tokens=2, stops=(best,), written=(1, 1))).token_id == best


def test_logprobs_are_of_the_raw_logits_the_chosen_token_first(logits: Tensor) -> None:
    row = make_row(temperature=0, logprobs=3, logit_bias={int(logits.argmin()): 100.0})
    token = draw(logits, row)
    assert token.logprobs is not None
    expected = logits.log_softmax(0)
    best = expected.topk(3).indices.tolist()
    assert list(token.logprobs) == [token.token_id, *best]
    for other, value in token.logprobs.items():
        assert math.isclose(value, float(expected[other]), abs_tol=1e-6)


def test_logprobs_zero_is_the_chosen_tokens_alone_and_none_is_none(logits: Tensor) -> None:
    assert list(draw(logits, make_row(temperature=0, logprobs=0)).logprobs or ()) == [int(logits.argmax())]
    assert draw(logits, make_row(temperature=0)).logprobs is None


def test_a_seed_draws_the_same_and_sample_i_draws_from_seed_plus_i(logits: Tensor) -> None:
    def texts(seed: int | None, index: int) -> list[int]:
        row = make_row(seed=seed, index=index, temperature=1.5)
        return [draw(logits, row).token_id for _ in range(20)]

    assert texts(7, 0) == texts(7, 0)
    assert texts(7, 2) == texts(9, 0)
    assert texts(7, 0) != texts(8, 0)
    assert texts(None, 0) != texts(None, 0)


params = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 3.0]),
        "seed": st.integers(0, 2**62),
        "top_k": st.sampled_from([None, 1, 4]),
        "top_p": st.sampled_from([None, 0.2, 0.9]),
        "min_p": st.sampled_from([None, 0.2]),
        "repetition_penalty": st.sampled_from([None, 0.5, 1.7]),
        "presence_penalty": st.sampled_from([None, -1.0, 1.0]),
        "frequency_penalty": st.sampled_from([None, 0.7]),
        "logit_bias": st.sampled_from([None, {3: 2.0}]),
        "min_tokens": st.sampled_from([None, 2]),
        "logprobs": st.sampled_from([None, 0, 2]),
    }
)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(params, min_size=2, max_size=5), seed=st.integers(0, 99))
def test_a_row_samples_the_same_alone_and_in_a_crowd(rows: list[dict[str, Any]], seed: int) -> None:
    torch.manual_seed(seed)
    steps = torch.randn(3, len(rows), VOCABULARY) * 2

    def run(members: list[int]) -> list[list[SampledToken | StageError]]:
        states = [make_row(stops=(5,), **rows[member]) for member in members]
        tokens = []
        for logits in steps:
            tokens.append([token for (token,) in sample(logits[members], states)])
            assert all(isinstance(token, SampledToken) for token in tokens[-1])
        return tokens

    crowd = run(list(range(len(rows))))
    for member in range(len(rows)):
        assert [step[0] for step in run([member])] == [step[member] for step in crowd]


@settings(max_examples=100, deadline=None)
@given(params=params, seed=st.integers(0, 99), wrong=st.integers(0, 4), other=st.none() | params)
@example(params={"temperature": 0.3, "seed": 124, "min_tokens": 2}, seed=0, wrong=2, other=None)  # plain behind two
def test_drafts_change_no_token_of_a_row_and_no_draw(
    params: dict[str, Any], seed: int, wrong: int, other: dict[str, Any] | None
) -> None:
    """wrong: the place of the draft's first token that is not what the row samples, of four."""
    torch.manual_seed(seed)
    logits = torch.randn(6, VOCABULARY) * 2
    plain = make_row(stops=(5,), **params)
    expected = [sample(logits[[place]], [plain])[0][0] for place in range(6)]
    tokens = [token.token_id for token in expected if isinstance(token, SampledToken)]
    draft = [token if place != wrong else (token + 1) % VOCABULARY for place, token in enumerate(tokens[:4])]
    row, batch, rows, drafts = make_row(stops=(5,), **params), logits[:5], [], [draft]
    if other is not None:
        rows, drafts = [make_row(stops=(5,), **other)], [[1], draft]
        batch = torch.cat([torch.randn(2, VOCABULARY), batch])
    got = sample(batch, [*rows, row], drafts)[-1]
    assert got == expected[: wrong + 1]
    assert sample(logits[[len(got)]], [row])[0] == expected[len(got) : len(got) + 1], "it goes on as if by itself"


def test_a_draft_behind_what_cannot_be_sampled_gives_no_token(logits: Tensor) -> None:
    batch = torch.stack([logits, logits, logits])
    batch[1, 3] = float("inf")
    best = int(logits.argmax())
    first, second = sample(batch, [make_row(temperature=0)], [[best, best]])[0]
    assert first == SampledToken(best) and isinstance(second, StageError)
    assert sample(batch, [make_row(temperature=0)], [[best + 1, best]])[0] == [SampledToken(best)]


def test_a_row_that_cannot_be_sampled_fails_alone(logits: Tensor) -> None:
    batch = torch.stack([logits, logits, logits])
    batch[1, 3] = float("nan")
    everything = tuple(range(VOCABULARY))
    rows = [
        make_row(temperature=0),
        make_row(temperature=0),
        make_row(temperature=1.0, min_tokens=1, stops=everything),
    ]
    (sound,), (not_a_number,), (nothing_left,) = sample(batch, rows)
    assert sound == SampledToken(int(logits.argmax()))
    assert isinstance(not_a_number, StageError) and "NaN" in str(not_a_number)
    assert isinstance(nothing_left, StageError) and "min_tokens" in str(nothing_left)


def test_sampling_leaves_the_logits_as_they_were(logits: Tensor) -> None:
    batch = logits[None].clone()
    sample(batch, [make_row(temperature=1.0, logit_bias={1: 5.0}, repetition_penalty=2.0)])
    assert torch.equal(batch[0], logits)
