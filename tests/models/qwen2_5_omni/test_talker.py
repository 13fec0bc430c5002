"""The talker's stage: what it says of itself, whom it refuses, and what it makes of broken inputs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ar import assert_clean, check, drain, make_spec, submit
from support.speech import CODEC_EOS, save_tiny_omni
from support.speech_engines import SPEECH, STATES, THINKER_PORTS, make_engine, make_stage, make_task

from vllm_omni.engine.ar.engine import AREngine
from vllm_omni.engine.ar.tapped_states import TOKENS
from vllm_omni.errors import CheckpointError, ConfigError, InvalidRequestError, OmniError
from vllm_omni.messages import StageDone, StageEvent, StageFailed, StageRows
from vllm_omni.params import DiffusionParams, SamplingParams
from vllm_omni.payload import StreamChunk, TensorSpec
from vllm_omni.request import OmniRequest
from vllm_omni.worker.model_pool import ModelPool

NUM_PROMPT, NUM_REPLY = 5, 4
TAP = {"h": {"layers": [1]}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_omni(tmp_path_factory.mktemp("talker") / "model")


@pytest.fixture(scope="module")
def pool() -> ModelPool:
    return ModelPool()


def inputs(seed: int = 0, **changes: StreamChunk) -> dict[str, StreamChunk]:
    """All three ports, whole."""
    generator = torch.Generator().manual_seed(seed)
    found = {
        "prompt_states": StreamChunk(torch.randn(NUM_PROMPT, 64, generator=generator), is_last=True),
        "reply_states": StreamChunk(torch.randn(NUM_REPLY, 64, generator=generator), is_last=True),
        "prompt_positions": StreamChunk(torch.arange(NUM_PROMPT)[:, None].repeat(1, 3), is_last=True),
    }
    return {**found, **changes}


def speak(engine: AREngine, params: SamplingParams = SPEECH, name: str = "r", **fields: Any) -> list[StageEvent]:
    submit(engine, make_task("talker", name, inputs(), params, **fields))
    return drain(engine)


def codes_of(events: list[StageEvent]) -> list[int]:
    return [code for event in events if isinstance(event, StageRows) for code in event.rows.tolist()]


def test_the_signatures_of_thinker_and_talker_fit_together(folder: Path) -> None:
    thinker, talker = (make_spec(make_stage(folder, part)).signature for part in ("thinker", "talker"))
    assert thinker.streamed_outputs - {TOKENS} == talker.streamed_inputs == talker.required_inputs == THINKER_PORTS
    assert all(thinker.outputs[port].fits(talker.inputs[port]) for port in THINKER_PORTS)
    assert talker.outputs == {"codes": TensorSpec(("T",))}
    assert talker.streamed_outputs == {"codes"} and not talker.results
    assert make_spec(make_stage(folder, "talker")).request_keys == {"speaker"}
    reading = {"prompt_states": STATES["prompt_states"]}
    encoder = make_spec(make_stage(folder, "thinker", task="encode", outputs=reading)).signature
    assert encoder.streamed_outputs - {TOKENS} == THINKER_PORTS - {"reply_states"}


@pytest.mark.parametrize("part", ["thinker", "talker"])
def test_the_memory_plan_is_what_is_then_held(folder: Path, part: str, pool: ModelPool) -> None:
    plan = make_spec(make_stage(folder, part)).plan_memory()
    assert plan.kv_pool_bytes == make_engine(folder, part, pool).get_stats()["kv_pool_bytes"]
    parameters = pool.get(next(key for key in pool._models if key[0].lower() == part), dict).parameters()
    assert plan.weights_bytes == sum(parameter.numel() * 4 for parameter in parameters)


def test_codes_whole_are_those_given_one_by_one_without_the_end(folder: Path, pool: ModelPool) -> None:
    free = codes_of(speak(make_engine(folder, "talker", pool)))
    last = free[6]
    params = SamplingParams(temperature=0, max_tokens=40, stop_token_ids=[last])
    events = speak(make_engine(folder, "talker", pool, wanted=["codes"]), params)
    done = events[-1]
    assert isinstance(done, StageDone)
    assert done.payload.tensors["codes"].dtype == torch.int64
    assert done.payload.tensors["codes"].tolist() == codes_of(events) == free[: free.index(last)]
    assert done.payload.meta["finish_reason"] == "stop"
    assert done.metrics["tokens"] == free.index(last) + 1


def test_the_ends_of_speech_are_pad_and_end_and_the_begin_is_never_written(folder: Path, pool: ModelPool) -> None:
    """Drawn hot, any code comes, but the begin does not, and an end ends."""
    engine = make_engine(folder, "talker", pool, wanted=["codes"])
    hot = {"temperature": 50.0, "top_k": 0, "top_p": 1.0, "max_tokens": 150}
    written: Counter[int] = Counter()
    reasons: Counter[str] = Counter()
    for seed in range(8):
        done = speak(engine, SamplingParams(**hot, seed=seed), str(seed))[-1]
        assert isinstance(done, StageDone)
        written.update(done.payload.tensors["codes"].tolist())
        reasons[done.payload.meta["finish_reason"]] += 1
    assert 61 not in written and not set(CODEC_EOS) & set(written) and len(written) > 40
    assert max(written) <= 59, "a code that token2wav has no sound for"
    assert reasons["stop"] > 0
    free = speak(engine, SamplingParams(**hot, seed=0, ignore_eos=True), "free")
    assert len(codes_of(free)) == 150 and max(codes_of(free)) <= 59
    assert_clean(engine)


def test_what_a_request_leaves_unset_is_as_published(folder: Path, pool: ModelPool) -> None:
    published = SamplingParams(temperature=0.9, top_k=40, top_p=0.8, repetition_penalty=1.05, seed=3, max_tokens=30)
    engine = make_engine(folder, "talker", pool)
    assert codes_of(speak(engine, SamplingParams(seed=3, max_tokens=30))) == codes_of(speak(engine, published))
    other = SamplingParams(seed=3, max_tokens=30, repetition_penalty=1.0, top_k=0, top_p=1.0, temperature=1.5)
    assert codes_of(speak(engine, other)) != codes_of(speak(engine, published))


@pytest.mark.parametrize(
    ("params", "fields", "complaint"),
    [
        (SamplingParams(), {"speaker": "Nobody"}, "speaker: got 'Nobody'.*Chelsie, Ethan"),
        (SamplingParams(), {"speaker": ["Ethan"]}, "speaker: got"),
        (SamplingParams(n=2), {}, "n: got 2, expected 1"),
        (
            SamplingParams(stop_token_ids=[64]),
            {},
            "stop_token_ids: got the token id 64, .* 64; .*by stage",
        ),
        (SamplingParams(logit_bias={99: 1.0}), {}, "logit_bias: got the token id 99"),
        (SamplingParams(stop="x"), {}, "stop: speech has no words.*by stage"),
        (SamplingParams(logprobs=0), {}, "logprobs: speech has no words"),
        (SamplingParams(skip_special_tokens=True), {}, "skip_special_tokens: speech has no words"),
        (SamplingParams(min_tokens=5, max_tokens=4), {}, "min_tokens: got 5, expected at most max_tokens"),
        (DiffusionParams(), {}, "expected SamplingParams"),
    ],
)
def test_a_request_that_cannot_be_spoken_is_refused(
    params: Any, fields: dict[str, Any], complaint: str, folder: Path, pool: ModelPool
) -> None:
    engine = make_engine(folder, "talker", pool)
    with pytest.raises(InvalidRequestError, match=complaint):
        check(engine, OmniRequest(prompt="x", fields=fields), params)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"prompt_states": StreamChunk(torch.zeros(5, 63), is_last=True)}, r"got rows \[5, 63\], expected \[n, 64\]"),
        ({"prompt_states": StreamChunk(torch.zeros(4, 64), is_last=True)}, "got 4 rows .* and 5 of"),
        ({"prompt_states": StreamChunk(torch.zeros(0, 64), is_last=True)}, "got 0 rows"),
        ({"codes": StreamChunk(torch.zeros(1))}, "'codes' is not streamed"),
    ],
)
def test_broken_inputs_fail_their_task_alone(changes: Any, complaint: str, folder: Path, pool: ModelPool) -> None:
    engine = make_engine(folder, "talker", pool)
    submit(engine, make_task("talker", "bad", inputs(**changes), SPEECH))
    submit(engine, make_task("talker", "good", inputs(), SPEECH))
    events = drain(engine)
    failures = [event for event in events if isinstance(event, StageFailed)]
    assert [event.request_id for event in failures] == ["bad"] and isinstance(failures[0].error, OmniError)
    with pytest.raises(OmniError, match=complaint):
        raise failures[0].error
    assert any(isinstance(event, StageDone) for event in events)
    assert_clean(engine)


def test_a_chunk_for_a_task_that_has_ended_is_dropped(folder: Path, pool: ModelPool) -> None:
    engine = make_engine(folder, "talker", pool)
    engine.feed("gone", "reply_states", StreamChunk(torch.zeros(1, 64)))
    assert not drain(engine)
    assert_clean(engine)


def test_a_prompt_that_the_pool_cannot_hold_fails_at_once(folder: Path, pool: ModelPool) -> None:
    engine = make_engine(folder, "talker", pool, num_blocks=1)
    failed = speak(engine)[-1]
    assert isinstance(failed, StageFailed) and "7 tokens with the begin of the speech" in str(failed.error)
    assert_clean(engine)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"part": "speaker"}, "got part 'speaker' of .*, expected one of talker, thinker"),
        (
            {"part": "talker", "task": "encode", "outputs": TAP},
            "task: got 'encode', but part talker",
        ),
        ({"part": "talker", "tokenizer": "x"}, "tokenizer: got 'x'"),
        ({"part": "talker", "chat_template": False}, "chat_template: got False"),
        ({"part": "talker", "outputs": TAP}, "outputs: got"),
        (
            {"part": "talker", "speculation": {"method": "prompt_lookup", "max_tokens": 4}},
            "speculation: got .* part talker",
        ),
        ({"part": "thinker", "outputs": {"prompt_positions": {"layers": [1]}}}, "prompt_positions, which the stage"),
        ({"part": "thinker", "sections": ["prompt_positions"]}, "prompt_positions, which the stage"),
    ],
)
def test_keys_that_a_part_does_not_know_are_refused(options: dict[str, Any], complaint: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make_spec(make_stage(folder, **options))


def test_a_folder_without_speakers_or_with_wrong_ones_does_not_load(tmp_path: Path) -> None:
    folder = save_tiny_omni(tmp_path / "model")
    torch.save(
        {"A": {"bos_token": 128, "cond": torch.zeros(1, 2), "ref_mel": torch.zeros(1, 3, 4)}}, folder / "spk_dict.pt"
    )
    with pytest.raises(CheckpointError, match=r"expected rows \[109, 110, 128\]"):
        make_engine(folder, "talker")
    (folder / "spk_dict.pt").unlink()
    with pytest.raises(ConfigError, match=r"spk_dict\.pt: missing"):
        make_spec(make_stage(folder, "talker"))
