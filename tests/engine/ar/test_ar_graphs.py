"""An AR stage whose decode steps are captured answers as one whose are not; keys that choose attention and graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.ar import (
    GREEDY,
    assert_clean,
    done,
    drain,
    make_engine,
    make_model_folder,
    make_spec,
    make_stage,
    make_task,
    run,
    submit,
    tokens_of,
)
from support.graphs import CalledGraphs

from vllm_omni import registry
from vllm_omni.engine.ar import loading
from vllm_omni.errors import ConfigError
from vllm_omni.messages import StageDone, StageFailed, StageTask
from vllm_omni.params import SamplingParams
from vllm_omni.worker.ar import decode_graphs
from vllm_omni.worker.ar.decode_ahead import DecodeAhead

PROMPTS = ["a red circle", "left of a blue square", "the end of the world", "a"]
PARAMS = [
    GREEDY,
    SamplingParams(temperature=1.0, seed=3, max_tokens=9, ignore_eos=True),
    SamplingParams(temperature=0, repetition_penalty=1.3, max_tokens=7, ignore_eos=True, logprobs=2),
    SamplingParams(temperature=0, max_tokens=5, n=1, ignore_eos=True),
]
DRAWS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.9, "top_k": 12, "top_p": 0.9},
    {"temperature": 1.2, "min_tokens": 4, "min_p": 0.02},
    {"temperature": 1.0, "presence_penalty": 0.5},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> CalledGraphs:
    """As if the CPU were a GPU that captures."""
    graphs = CalledGraphs()
    monkeypatch.setattr(loading, "CudaGraphs", lambda device: graphs)
    monkeypatch.setattr(decode_graphs, "is_cuda", lambda device: True)
    monkeypatch.setitem(registry.TABLES["attention"], "capturable", "support.attention:CapturableAttention")
    return graphs


def answers(folder: Path, **stage_keys: Any) -> list[dict[str, Any]]:
    engine = make_engine(folder, max_num_seqs=4, **stage_keys)
    tasks = [make_task(prompt, params, f"r{i}") for i, (prompt, params) in enumerate(zip(PROMPTS, PARAMS, strict=True))]
    events = run(engine, *tasks)
    assert_clean(engine)
    return [dict(done(events[task.request_id]).payload.meta) for task in tasks]


def without_logprobs(answer: dict[str, Any]) -> dict[str, Any]:
    return {**answer, "completions": [{**c, "logprobs": None} for c in answer["completions"]]}


def test_answers_are_those_of_plain_steps(folder: Path, graphs: CalledGraphs) -> None:
    captured = answers(folder, attention="capturable")
    assert graphs.num_captured == 3 and graphs.num_replayed > 8
    plain = answers(folder, attention="reference")
    assert graphs.num_captured == 3
    assert [without_logprobs(answer) for answer in captured] == [without_logprobs(answer) for answer in plain]
    for ours, theirs in zip(captured[2]["completions"], plain[2]["completions"], strict=True):
        for mine, other in zip(ours["logprobs"], theirs["logprobs"], strict=True):
            assert [token for token, _ in mine] == [token for token, _ in other]
            assert [value for _, value in mine] == pytest.approx([value for _, value in other], abs=1e-4)


class Begun:
    """Counts the steps that are begun ahead, and those of them that were wanted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_begun = self.num_wanted = 0
        begin, rows_of = DecodeAhead.begin, DecodeAhead._rows_of

        def counted_begin(ahead: DecodeAhead, *args: Any) -> None:
            self.num_begun += 1
            begin(ahead, *args)

        def counted_rows(ahead: DecodeAhead, *args: Any) -> list[int] | None:
            rows = rows_of(ahead, *args)
            self.num_wanted += rows is not None
            return rows

        monkeypatch.setattr(DecodeAhead, "begin", counted_begin)
        monkeypatch.setattr(DecodeAhead, "_rows_of", counted_rows)


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> Begun:
    return Begun(monkeypatch)


def test_steps_are_begun_before_the_tokens_of_the_last_are_read(
    folder: Path, graphs: CalledGraphs, begun: Begun
) -> None:
    """Of rows that draw as well: what with is known."""
    draws: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.8, "seed": 4},
        {"temperature": 1.3, "top_k": 9, "top_p": 0.8, "seed": 1},
        {"temperature": 1.0, "top_p": 0.7, "min_p": 0.01, "seed": 2},
    ]
    params = [
        SamplingParams(max_tokens=count, ignore_eos=True, **draw)
        for count, draw in zip((9, 30, 2, 17), draws, strict=True)
    ]
    tasks = [make_task(prompt, each, f"r{i}") for i, (prompt, each) in enumerate(zip(PROMPTS, params, strict=True))]
    engine = make_engine(folder, max_num_seqs=4, attention="capturable")
    events = run(engine, *tasks)
    assert_clean(engine)
    # all but the first step behind the prompts, and none behind the last token of all
    assert begun.num_begun == begun.num_wanted == 28
    plain = run(make_engine(folder, max_num_seqs=4, attention="reference"), *tasks)
    for task in tasks:
        assert tokens_of(events[task.request_id]) == tokens_of(plain[task.request_id])


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_comes_between_a_step_and_the_next_changes_no_token(
    folder: Path, graphs: CalledGraphs, data: st.DataObject
) -> None:
    """Arrivals, aborts, pauses, a pool that is too small for all, and rows that draw, on the device or on the host."""
    engine = make_engine(
        folder, max_num_seqs=3, attention="capturable", num_blocks=data.draw(st.sampled_from([14, 40]))
    )
    plain = make_engine(folder, max_num_seqs=3, attention="reference")
    alive: dict[str, StageTask] = {}
    ended: dict[str, Any] = {}
    for turn in range(data.draw(st.integers(5, 25))):
        action = data.draw(st.sampled_from(["step", "step", "step", "add", "abort", "pause", "resume"]))
        if action == "add" or turn == 0:
            draw = data.draw(st.sampled_from(DRAWS))
            least = draw.get("min_tokens", 1)
            params = SamplingParams(seed=turn, max_tokens=data.draw(st.integers(least, 12)), **draw)
            task = alive[f"r{turn}"] = make_task(data.draw(st.sampled_from(PROMPTS)), params, f"r{turn}")
            submit(engine, task)
        elif action == "step":
            ended |= {event.request_id: event for event in engine.step() if isinstance(event, StageDone | StageFailed)}
            engine.check_integrity()
        elif alive:
            request_id = data.draw(st.sampled_from(sorted(alive)))
            {"abort": engine.abort, "pause": engine.pause, "resume": engine.resume}[action](request_id)
            if action == "abort":
                alive.pop(request_id)
    for request_id in alive:
        engine.resume(request_id)
    ended |= {event.request_id: event for event in drain(engine) if isinstance(event, StageDone | StageFailed)}
    assert_clean(engine)
    for request_id, task in alive.items():
        assert tokens_of(ended[request_id]) == tokens_of(run(plain, task)[request_id])


def test_the_key_switches_graphs_off(folder: Path, graphs: CalledGraphs) -> None:
    answers(folder, attention="capturable", cuda_graphs=False)
    assert graphs.num_captured == 0


def test_a_stage_that_only_encodes_captures_nothing(folder: Path, graphs: CalledGraphs) -> None:
    make_engine(folder, task="encode", wanted=["h"], outputs={"h": {"layers": [-2]}}, attention="capturable")
    assert graphs.num_captured == 0


def test_graphs_where_there_can_be_none_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="cuda_graphs: got true, but got device cpu, expected cuda; remove the key"):
        make_spec(make_stage(folder, cuda_graphs=True))


def test_a_backend_that_does_not_fit_is_refused_before_loading(folder: Path) -> None:
    with pytest.raises(ConfigError, match="attention: 'flash': got device cpu, expected cuda; or use attention: auto"):
        make_spec(make_stage(folder, attention="flash"))


def test_check_says_which_attention_and_whether_steps_are_captured(folder: Path, graphs: CalledGraphs) -> None:
    assert make_spec(make_stage(folder, attention="reference")).note().startswith("attention reference")
    note = make_spec(make_stage(folder, attention="capturable")).note()
    assert note.startswith("attention capturable, decode steps in CUDA graphs")
