"""The AR stage whole, over tiny random models: the same answer in any company, taps, prefixes, preemption, aborts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.ar import (
    GREEDY,
    PROMPT_STATES,
    WRITTEN_STATES,
    assert_clean,
    done,
    drain,
    make_encoder,
    make_engine,
    make_model_folder,
    make_task,
    make_tokenizer,
    run,
    states_of,
    submit,
    tokens_of,
)

from vllm_omni.engine.ar.engine import AREngine
from vllm_omni.errors import StageError
from vllm_omni.messages import StageDone, StageEvent, StageFailed, StageTask
from vllm_omni.params import SamplingParams
from vllm_omni.worker.model_pool import ModelPool

PROMPTS = [
    "a red circle left of a blue square",
    "a",
    "the end of it " * 6,
    "你好 你好",
    "a red circle right of it",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("ar") / "model")


@pytest.mark.parametrize("outputs", [{}, WRITTEN_STATES])
def test_a_request_writes_the_same_alone_in_a_crowd_and_in_another_order(folder: Path, outputs: Any) -> None:
    def answers(prompts: list[str], **options: Any) -> dict[str, StageDone | StageFailed]:
        engine = make_engine(folder, wanted=outputs, outputs=outputs, **options)
        ended = run(engine, *(make_task(prompt, GREEDY, prompt) for prompt in prompts))
        assert_clean(engine)
        return ended

    alone = {prompt: answers([prompt])[prompt] for prompt in PROMPTS}
    for crowd in (
        answers(PROMPTS),
        answers(PROMPTS[::-1]),
        answers(PROMPTS, max_num_batched_tokens=5),
        answers(PROMPTS, max_num_seqs=2, block_size=3),
        answers(PROMPTS, num_blocks=16),
        answers(PROMPTS, prefix_caching=False),
    ):
        for prompt in PROMPTS:
            assert tokens_of(crowd[prompt]) == tokens_of(alone[prompt])
            if outputs:
                torch.testing.assert_close(states_of(crowd[prompt]), states_of(alone[prompt]), rtol=1e-4, atol=1e-5)


def test_whole_prompts_give_the_same_states_alone_and_in_a_crowd(folder: Path) -> None:
    alone = [states_of(run(make_encoder(folder), make_task(prompt))["r"]) for prompt in PROMPTS]
    engine = make_encoder(folder, prefix_caching=False)
    crowd = run(engine, *(make_task(prompt, None, str(i)) for i, prompt in enumerate(PROMPTS)))
    for index, states in enumerate(alone):
        torch.testing.assert_close(states_of(crowd[str(index)]), states, rtol=1e-5, atol=1e-5)


def test_a_seeded_request_draws_the_same_alone_and_in_a_crowd(folder: Path) -> None:
    params = [
        SamplingParams(temperature=1.2, top_p=0.9, seed=seed, max_tokens=10, ignore_eos=True) for seed in range(5)
    ]
    alone = [tokens_of(run(make_engine(folder), make_task(PROMPTS[i], params[i]))["r"]) for i in range(5)]
    crowd = run(make_engine(folder), *(make_task(PROMPTS[i], params[i], str(i)) for i in range(5)))
    assert [tokens_of(crowd[str(i)]) for i in range(5)] == alone
    assert len({tuple(tokens) for tokens in alone}) == 5


def test_n_samples_draw_from_seed_plus_i(folder: Path) -> None:
    params = SamplingParams(temperature=1.2, seed=3, n=3, max_tokens=10, ignore_eos=True)
    many = done(run(make_engine(folder), make_task(PROMPTS[0], params))["r"])
    singles = [
        run(
            make_engine(folder),
            make_task(PROMPTS[0], SamplingParams(temperature=1.2, seed=3 + i, max_tokens=10, ignore_eos=True)),
        )
        for i in range(3)
    ]
    assert [c["token_ids"] for c in many.payload.meta["completions"]] == [tokens_of(one["r"]) for one in singles]
    assert many.payload.meta["text"] == many.payload.meta["completions"][0]["text"]
    assert many.metrics["tokens"] == 30


def test_a_prefix_hit_returns_the_states_of_all_prompt_tokens(folder: Path) -> None:
    fresh = done(run(make_encoder(folder), make_task(PROMPTS[0]))["r"])
    engine = make_encoder(folder)
    run(engine, make_task(PROMPTS[0] + " and more", None, "first"))
    again = done(run(engine, make_task(PROMPTS[0], None, "again"))["again"])
    assert again.metrics["cache_hits"] > 0
    assert again.metrics["prompt_tokens"] == again.metrics["tokens"] == len(states_of(fresh))
    torch.testing.assert_close(states_of(again), states_of(fresh), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [1, 4, 8, 9])
def test_a_wholly_cached_prompt_still_answers(folder: Path, length: int) -> None:
    ids = list(range(40, 40 + length))
    engine = make_engine(folder, wanted=["h"], outputs=PROMPT_STATES)
    first, second = (run(engine, make_task(ids, GREEDY, name))[name] for name in ("one", "two"))
    assert tokens_of(first) == tokens_of(second)
    assert done(second).metrics["cache_hits"] == (length - 1) // 4 * 4
    torch.testing.assert_close(states_of(first), states_of(second), rtol=1e-4, atol=1e-5)
    assert len(states_of(second)) == length


def test_identical_prompts_in_one_step_each_get_their_answer(folder: Path) -> None:
    engine = make_engine(folder, wanted=["h"], outputs=WRITTEN_STATES)
    ended = run(engine, *(make_task(PROMPTS[0], GREEDY, str(i)) for i in range(4)))
    assert len({tuple(tokens_of(event)) for event in ended.values()}) == 1
    assert all(states_of(event).shape == (12, 64) for event in ended.values())
    assert_clean(engine)


def test_preempt_and_resume_gives_the_same_tokens_and_one_row_per_token(folder: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    calm = make_engine(folder, wanted=["h"], outputs=WRITTEN_STATES)
    tight = make_engine(folder, wanted=["h"], outputs=WRITTEN_STATES, num_blocks=24)
    tasks = [make_task(PROMPTS[i], params, str(i)) for i in (0, 3, 4)]
    expected, ended = run(calm, *tasks), run(tight, *tasks)
    assert sum(done(event).metrics["preemptions"] for event in ended.values()) > 0
    for name, event in ended.items():
        assert tokens_of(event) == tokens_of(expected[name])
        assert len(states_of(event)) == 30
        torch.testing.assert_close(states_of(event), states_of(expected[name]), rtol=1e-4, atol=1e-5)
    assert_clean(tight)


def test_the_state_of_the_last_token_exists_when_max_tokens_ends_the_text(folder: Path) -> None:
    ids = make_tokenizer()(PROMPTS[0])["input_ids"]
    written = run(make_engine(folder, wanted=["h"], outputs=WRITTEN_STATES), make_task(ids, GREEDY))["r"]
    whole = run(make_encoder(folder, outputs={"h": {"layers": [1, -1]}}), make_task(ids + tokens_of(written)))["r"]
    torch.testing.assert_close(states_of(written), states_of(whole)[len(ids) :], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("position", [0, 5])
def test_the_token_that_ends_the_text_has_no_state(folder: Path, position: int) -> None:
    free = tokens_of(run(make_engine(folder), make_task(PROMPTS[0], GREEDY))["r"])
    position = free.index(free[position])
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=[free[position]])
    event = run(make_engine(folder, wanted=["h"], outputs=WRITTEN_STATES), make_task(PROMPTS[0], params))["r"]
    assert tokens_of(event) == free[: position + 1]
    assert states_of(event).shape == (position, 64)


def test_what_nobody_wants_is_not_kept(folder: Path) -> None:
    stage_outputs = {"h": {"layers": [1]}, "deep": {"layers": [-1]}}
    none, one, both = (
        make_engine(folder, task="encode", wanted=wanted, outputs=stage_outputs)
        for wanted in ([], ["h"], ["h", "deep"])
    )
    sizes = [engine.get_stats()["kv_pool_bytes"] for engine in (none, one, both)]
    assert sizes[0] == 0 and 0 < sizes[1] < sizes[2]
    assert dict(done(run(none, make_task("a"))["r"]).payload.tensors) == {}
    assert list(done(run(one, make_task("a"))["r"]).payload.tensors) == ["h"]


def test_payload_tensors_outlive_the_blocks_they_came_from(folder: Path) -> None:
    engine = make_encoder(folder, num_blocks=16)
    first = states_of(run(engine, make_task(PROMPTS[0]))["r"])
    copy = first.clone()
    run(engine, make_task(PROMPTS[2], None, "other"))
    assert torch.equal(first, copy)


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_abort_frees_all_and_no_event_follows(folder: Path, steps: int) -> None:
    engine = make_engine(folder, max_num_batched_tokens=8, inputs={"prompt": "writer.text"})
    for name in ("one", "two", "bad"):
        engine.submit(make_task("unread", GREEDY, name, {"prompt": PROMPTS[0] if name != "bad" else ""}))
    for _ in range(steps):
        engine.step()
    for name in ("one", "bad", "unknown", "one"):
        engine.abort(name)
        engine.check_integrity()
    assert {event.request_id for event in drain(engine)} <= {"two"}
    assert_clean(engine)


def test_the_same_identifier_twice_at_once_is_refused_and_harms_nobody(folder: Path) -> None:
    engine = make_engine(folder)
    submit(engine, make_task("a", GREEDY))
    with pytest.raises(StageError, match="submitted twice"):
        submit(engine, make_task("b", GREEDY))
    done(run(engine)["r"])
    done(run(engine, make_task("a", GREEDY))["r"])


requests = st.fixed_dictionaries(
    {
        "prompt": st.lists(st.integers(60, 62), min_size=1, max_size=14),
        "params": st.builds(
            SamplingParams,
            temperature=st.sampled_from([0.0, 1.0]),
            seed=st.just(1),
            max_tokens=st.integers(1, 10),
            n=st.just(1),
            ignore_eos=st.booleans(),
            logprobs=st.sampled_from([None, 1]),
        ),
    }
)
operations = st.lists(st.one_of(requests, st.integers(1, 4), st.just("abort")), min_size=4, max_size=24)


def test_a_long_prompt_comes_in_small_steps_beside_a_text_that_is_read_along_and_changes_no_answer(
    folder: Path,
) -> None:
    short, long = [60, 61, 62], [60 + index % 7 for index in range(100)]
    answers, steps = [], []
    for wait_s, is_watched in ((1e-6, True), (1e-6, False), (None, True)):
        engine = make_engine(folder, max_decode_wait_s=wait_s)
        submit(engine, dataclasses.replace(make_task(short, GREEDY, "writer"), is_watched=is_watched))
        events = engine.step()
        submit(engine, make_task(long, GREEDY, "reader"))
        ended = {event.request_id: event for event in [*events, *drain(engine)] if isinstance(event, StageDone)}
        answers.append([tokens_of(ended[name]) for name in ("writer", "reader")])
        steps.append(done(ended["reader"]).metrics["steps"])
    assert answers[0] == answers[1] == answers[2]
    assert steps == [100 // 16 + 1 + 11, 12, 12], "no more than sixteen tokens of the prompt a step"


@pytest.fixture(scope="module")
def pool() -> ModelPool:
    return ModelPool()


def live(engine: AREngine, operations: list[Any], data: st.DataObject) -> tuple[dict[str, StageTask], list[StageEvent]]:
    """Runs the operations to the end; all tasks, and all events."""
    tasks: dict[str, StageTask] = {}
    aborted: set[str] = set()
    events: list[StageEvent] = []
    for operation in operations:
        if isinstance(operation, dict):
            name = str(len(tasks))
            tasks[name] = make_task(operation["prompt"], operation["params"], name)
            submit(engine, tasks[name])
        elif isinstance(operation, int):
            for _ in range(operation):
                events += engine.step()
        elif tasks:
            name = data.draw(st.sampled_from(sorted(tasks)))
            engine.abort(name)
            aborted.add(name)
        engine.check_integrity()
    events += drain(engine)
    assert_clean(engine)
    ended = [event.request_id for event in events if isinstance(event, (StageDone, StageFailed))]
    assert len(ended) == len(set(ended))
    assert set(tasks) - aborted <= set(ended) <= set(tasks)
    return tasks, events


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=operations, data=st.data())
def test_any_mix_of_requests_steps_and_aborts_ends_clean_and_right(
    folder: Path, pool: ModelPool, operations: list[Any], data: st.DataObject
) -> None:
    engine = make_engine(
        folder,
        models=pool,
        wanted=["h", "p"],
        outputs={**WRITTEN_STATES, "p": {"layers": [-2], "tokens": "prompt"}},
        num_blocks=9,
        max_num_seqs=4,
        max_num_batched_tokens=9,
    )
    tasks, events = live(engine, operations, data)
    for event in events:
        if isinstance(event, StageDone):
            alone = make_engine(folder, models=pool, wanted=["h"], outputs=WRITTEN_STATES)
            expected = run(
                alone, make_task(tasks[event.request_id].request.prompt, tasks[event.request_id].params), verify=False
            )["r"]
            assert tokens_of(event) == tokens_of(expected)
            torch.testing.assert_close(states_of(event), states_of(expected), rtol=1e-3, atol=1e-4)
            assert len(event.payload.tensors["p"]) == len(tasks[event.request_id].request.prompt)


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers see five tokens."""
    types = {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["sliding_attention"] * 3}
    return make_model_folder(tmp_path_factory.mktemp("ar") / "windowed", **types)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=operations, data=st.data())
def test_any_mix_in_a_model_of_windows_writes_what_it_writes_alone_with_room_for_all(
    windowed: Path, pool: ModelPool, operations: list[Any], data: st.DataObject
) -> None:
    engine = make_engine(windowed, models=pool, num_blocks=5, max_num_seqs=4, max_num_batched_tokens=8)
    tasks, events = live(engine, operations, data)
    for event in events:
        if isinstance(event, StageDone):
            task = tasks[event.request_id]
            alone = make_engine(windowed, models=pool, num_blocks=64, prefix_caching=False)
            assert tokens_of(event) == tokens_of(run(alone, make_task(task.request.prompt, task.params))["r"])
