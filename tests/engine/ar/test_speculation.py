"""Drafts change no answer: tokens, texts, log probabilities and states, with their rows, are as without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.ar import (
    GREEDY,
    WRITTEN_STATES,
    assert_clean,
    done,
    drain,
    make_engine,
    make_model_folder,
    make_options,
    make_task,
    run,
    submit,
    tokens_of,
)
from support.graphs import CalledGraphs

from vllm_omni import registry
from vllm_omni.engine.ar import loading
from vllm_omni.engine.ar.engine import AREngine
from vllm_omni.errors import ConfigError
from vllm_omni.messages import StageDone, StageEvent, StageFailed, StageProgress, StageRows
from vllm_omni.params import SamplingParams
from vllm_omni.worker.ar import decode_graphs
from vllm_omni.worker.model_pool import ModelPool

SPECULATION = {"method": "prompt_lookup", "max_tokens": 4, "min_ngram": 1, "max_ngram": 2}
TAPS = {
    **WRITTEN_STATES,
    "p": {"layers": [-2], "tokens": "prompt"},
    "fed": {"layers": [1], "tokens": "followed"},
}
FEW = dict.fromkeys((60, 61, 62), 100.0)  # a text of three tokens repeats itself
LONG = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, logit_bias=FEW)
WINDOWED = {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["sliding_attention"] * 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("ar") / "model")


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("ar") / "windowed", **WINDOWED)


@pytest.fixture(scope="module")
def pool() -> ModelPool:
    return ModelPool()


def counts(engine: AREngine) -> tuple[int, int]:
    """Tokens drafted, and accepted."""
    stats = engine.get_stats()
    return stats["num_drafted_tokens"], stats["num_accepted_tokens"]


def rows_of(events: list[StageEvent], name: str, port: str) -> torch.Tensor:
    """All rows of a streamed port; the last piece, and no other, says that it is."""
    found = [
        event for event in events if isinstance(event, StageRows) and (event.request_id, event.port) == (name, port)
    ]
    assert [piece.is_last for piece in found] == [False] * (len(found) - 1) + [True]
    return torch.cat([piece.rows for piece in found])


def parts_of(events: list[StageEvent], name: str) -> list[StageProgress]:
    return [event for event in events if isinstance(event, StageProgress) and event.request_id == name]


def assert_same_answers(ours: list[StageEvent], plain: list[StageEvent], names: list[str]) -> None:
    """Payloads, the parts in which the words came, and rows."""
    ended, expected = ({e.request_id: e for e in events if isinstance(e, StageDone)} for events in (ours, plain))
    assert set(ended) == set(expected) == set(names)
    for name in names:
        got, wanted = ended[name].payload, expected[name].payload
        for completion, other in zip(got.meta["completions"], wanted.meta["completions"], strict=True):
            logprobs, others = (dict(c).pop("logprobs") for c in (completion, other))
            assert {**completion, "logprobs": None} == {**other, "logprobs": None}
            assert (logprobs is None) == (others is None)
            for position, theirs in zip(logprobs or (), others or (), strict=True):
                assert [value for _, value in position] == pytest.approx([value for _, value in theirs], abs=1e-4)
                assert position[0][0] == theirs[0][0]
        parts, others = parts_of(ours, name), parts_of(plain, name)
        for sample in range(len(got.meta["completions"])):
            ours_, theirs_ = ([p for p in many if p.sample == sample] for many in (parts, others))
            assert [(p.text, p.token_ids, p.finish_reason) for p in ours_] == [
                (p.text, p.token_ids, p.finish_reason) for p in theirs_
            ]
        for port in wanted.tensors:
            torch.testing.assert_close(got.tensors[port], wanted.tensors[port], rtol=1e-3, atol=1e-4)


def answered(engine: AREngine, requests: list[tuple[list[int], SamplingParams]]) -> list[StageEvent]:
    submit(engine, *(make_task(ids, params, str(index)) for index, (ids, params) in enumerate(requests)))
    events = drain(engine)
    assert_clean(engine)
    assert [event.error for event in events if isinstance(event, StageFailed)] == []
    return events


params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
    seed=st.integers(0, 9),
    max_tokens=st.integers(6, 24),
    n=st.sampled_from([1, 1, 3]),
    ignore_eos=st.booleans(),
    logprobs=st.sampled_from([None, None, 2]),
    top_p=st.sampled_from([None, 0.8]),
    top_k=st.sampled_from([None, 5]),
    min_tokens=st.sampled_from([None, 6]),
    repetition_penalty=st.sampled_from([None, None, 1.2]),
    frequency_penalty=st.sampled_from([None, None, 0.5]),
    stop=st.sampled_from([None, ["e"], ["\ufffd", "a"]]),
    stop_token_ids=st.sampled_from([None, None, [62, 63]]),
    logit_bias=st.sampled_from([None, FEW, FEW]),
)
requests = st.lists(st.tuples(st.lists(st.integers(60, 62), min_size=1, max_size=14), params), min_size=1, max_size=4)
sizes = st.fixed_dictionaries(
    {
        "max_num_batched_tokens": st.sampled_from([7, 2048]),
        "num_blocks": st.sampled_from([14, 64]),
        "block_size": st.sampled_from([1, 3, 4]),
        "max_num_seqs": st.sampled_from([5, 16]),
        "prefix_caching": st.booleans(),
    }
).map(lambda sizes: {**sizes, "num_blocks": sizes["num_blocks"] * 4 // sizes["block_size"]})
speculations = st.builds(
    lambda most, low, more: {"method": "prompt_lookup", "max_tokens": most, "min_ngram": low, "max_ngram": low + more},
    st.sampled_from([1, 4]),
    st.integers(1, 2),
    st.integers(0, 2),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests=requests, sizes=sizes, speculation=speculations, taps=st.booleans())
def test_any_requests_are_answered_as_without_drafts(
    folder: Path, pool: ModelPool, requests: Any, sizes: dict[str, Any], speculation: Any, taps: bool
) -> None:
    if taps:  # whose states are of one sample
        requests = [(ids, params if params.n == 1 else GREEDY) for ids, params in requests]
    outputs = TAPS if taps else {}
    plain = make_engine(folder, models=pool, outputs=outputs, wanted=outputs, num_blocks=256)
    ours = make_engine(folder, models=pool, outputs=outputs, wanted=outputs, speculation=speculation, **sizes)
    names = [str(index) for index in range(len(requests))]
    for _ in range(2):  # the second time from the prefix cache
        assert_same_answers(answered(ours, requests), answered(plain, requests), names)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests=requests, sizes=sizes)
def test_so_they_are_in_a_model_of_windows(windowed: Path, pool: ModelPool, requests: Any, sizes: Any) -> None:
    plain = make_engine(windowed, models=pool, num_blocks=256, prefix_caching=False)
    ours = make_engine(windowed, models=pool, speculation=SPECULATION, **sizes)
    names = [str(index) for index in range(len(requests))]
    for _ in range(2):
        assert_same_answers(answered(ours, requests), answered(plain, requests), names)


@pytest.mark.parametrize("temperature", [0.0, 0.2])
def test_what_repeats_itself_takes_fewer_steps(folder: Path, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=1, max_tokens=60, ignore_eos=True, logit_bias=FEW)
    plain = done(run(make_engine(folder), make_task("a red circle", params))["r"])
    engine = make_engine(folder, speculation=SPECULATION)
    ours = done(run(engine, make_task("a red circle", params))["r"])
    assert tokens_of(ours) == tokens_of(plain)
    drafted, accepted = counts(engine)
    assert ours.metrics["steps"] == plain.metrics["steps"] - accepted < plain.metrics["steps"] * 0.7
    assert (ours.metrics["drafted_tokens"], ours.metrics["accepted_tokens"]) == (drafted, accepted)
    assert drafted >= accepted and "drafted_tokens" not in plain.metrics


def test_rows_that_are_streamed_are_those_of_accepted_tokens(folder: Path) -> None:
    plain, ours = (
        make_engine(folder, outputs=TAPS, streamed=TAPS, **options)
        for options in ({}, {"speculation": SPECULATION, "num_blocks": 40})
    )
    prompts = [[60, 61, 62] * 4, [61, 60] * 5]
    events, expected = ([*answered(engine, [(ids, LONG) for ids in prompts])] for engine in (ours, plain))
    assert counts(ours)[1] > 20
    for name in ("0", "1"):
        for port in TAPS:
            got, wanted = rows_of(events, name, port), rows_of(expected, name, port)
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_preempted_sequences_go_on_with_their_drafts(folder: Path) -> None:
    requests = [([60, 61, 62, index] * 3, LONG) for index in range(60, 64)]
    ours = make_engine(folder, speculation=SPECULATION, num_blocks=26)
    events = answered(ours, requests)
    assert ours.get_stats()["num_preemptions"] > 0 and counts(ours)[1] > 0
    assert_same_answers(events, answered(make_engine(folder), requests), ["0", "1", "2", "3"])


def test_no_block_of_a_void_token_serves_a_prefix(folder: Path) -> None:
    """With blocks of one token every computed token of a text is a prefix of its own."""
    engine = make_engine(folder, speculation=SPECULATION, block_size=1, num_blocks=200)
    text = tokens_of(run(engine, make_task([60, 61, 62] * 4, LONG))["r"])
    drafted, accepted = counts(engine)
    assert drafted > accepted
    assert len(engine._scheduler.blocks._cached) == 12 + len(text) - 1


def test_a_mate_with_a_long_prompt_is_answered_beside_drafts(folder: Path) -> None:
    requests = [([60, 61] * 6, LONG), (list(range(40, 100)) * 2, GREEDY)]
    ours = make_engine(folder, speculation=SPECULATION, max_num_batched_tokens=9)
    assert_same_answers(answered(ours, requests), answered(make_engine(folder), requests), ["0", "1"])
    assert counts(ours)[1] > 0


def test_drafts_run_in_captured_steps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the CPU were a GPU that captures."""
    graphs = CalledGraphs()
    monkeypatch.setattr(loading, "CudaGraphs", lambda device: graphs)
    monkeypatch.setattr(decode_graphs, "is_cuda", lambda device: True)
    monkeypatch.setitem(registry.TABLES["attention"], "capturable", "support.attention:CapturableAttention")
    requests = [
        ([60, 61] * 6, LONG),
        ([62] * 5, SamplingParams(temperature=0.5, seed=3, max_tokens=30, logit_bias=FEW)),
    ]
    ours = make_engine(folder, speculation=SPECULATION, attention="capturable")
    events = answered(ours, requests)
    assert counts(ours)[1] > 10 and graphs.num_replayed > 10
    assert_same_answers(events, answered(make_engine(folder, attention="reference"), requests), ["0", "1"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_of_a_draft_have_the_bits_of_single_steps(folder: Path, dtype: str) -> None:
    """Where a row's sums do not depend on the number of rows, as in the kernels."""
    long = SamplingParams(temperature=0, max_tokens=120, ignore_eos=True, logprobs=1, logit_bias=FEW)
    plain, ours = (make_engine(folder, dtype=dtype, **keys) for keys in ({}, {"speculation": SPECULATION}))
    got, expected = (done(run(engine, make_task([60, 61] * 20, long))["r"]).payload.meta for engine in (ours, plain))
    assert counts(ours)[1] > 40
    if registry.resolve("attention", plain._spec.attention).runs_layers:
        assert got["completions"] == expected["completions"]
    else:
        assert got["token_ids"] == expected["token_ids"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"speculation": {"method": "prophecy"}}, "speculation.method"),
        ({"speculation": {}}, "speculation.method: missing"),
        (
            {"speculation": {**SPECULATION, "max_tokens": 0}},
            "speculation.max_tokens: got 0, expected at least 1 and at most 64",
        ),
        ({"speculation": {**SPECULATION, "max_tokens": 65}}, "speculation.max_tokens: got 65"),
        ({"speculation": {**SPECULATION, "min_ngram": 3}}, "speculation.max_ngram: got 2, expected at least 3"),
        ({"speculation": {**SPECULATION, "draft": 3}}, "speculation.draft: unknown key"),
        ({"speculation": SPECULATION, "max_num_seqs": 4}, "max_num_seqs: got 4, expected more than"),
        ({"speculation": SPECULATION, "task": "encode", "outputs": WRITTEN_STATES}, "writes nothing"),
    ],
)
def test_keys_that_cannot_be_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make_options(**options)
