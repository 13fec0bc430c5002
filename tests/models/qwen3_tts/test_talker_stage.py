"""The talker's stage: crowds, small pools, pauses and aborts change no code; what cannot be said is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.ar import assert_clean, check, drain, is_busy, make_spec, submit
from support.qwen3_tts import cases, config, sound, write_folder
from support.qwen3_tts_configs import TASKS, published_config
from support.talkers import (
    CROWD,
    DRAWN,
    FRAMES,
    SAMPLE_RATE,
    Talkers,
    codes_of,
    crowd,
    make_stage,
    make_task,
    stage_of,
)
from torch import Tensor

from vllm_omni.engine.ar.engine import AREngine
from vllm_omni.errors import ConfigError, InvalidRequestError, OmniError
from vllm_omni.messages import StageDone, StageFailed
from vllm_omni.models.qwen3_tts.config import TalkerConfig
from vllm_omni.models.qwen3_tts.talker import Talker
from vllm_omni.params import DiffusionParams, SamplingParams
from vllm_omni.request import OmniRequest
from vllm_omni.worker.ar.frames.frame_writer import Frames

CASES = cases()
SPEAKER, DESIGN, CLONE = CASES["speaker"], CASES["design"], CASES["clone"]


@pytest.fixture(scope="module")
def talkers(tmp_path_factory: pytest.TempPathFactory) -> Talkers:
    return Talkers({task: write_folder(tmp_path_factory.mktemp(task), task) for task in TASKS})


@pytest.fixture(scope="module")
def alone(talkers: Talkers) -> dict[str, Tensor]:
    """What each says in an engine of its own."""
    found = {}
    for index, name in enumerate(CROWD):
        engine = talkers.engine(SPEAKER, (), streamed=("codes",))
        submit(engine, crowd()[index])
        found[name] = codes_of(drain(engine), name)
    return found


def run(engine: AREngine, tasks: list[Any], *, pauses: bool = False, aborts: bool = False) -> list[Any]:
    """Every step one more comes; with pauses, each stands still now and then."""
    events, step, left = [], 0, list(tasks)
    while left or is_busy(engine):
        if left:
            submit(engine, left.pop(0))
        if aborts and step == 4:
            submit(engine, make_task(DESIGN, SamplingParams(seed=9), "gone", instructions=None, language="english"))
        if aborts and step == 7:
            engine.abort("gone")
        for index, name in enumerate(CROWD if pauses else ()):
            (engine.pause if (step + index) % 5 == 0 else engine.resume)(name)
        events += engine.step()
        engine.check_integrity()
        step += 1
        if pauses and not is_busy(engine):
            for name in CROWD:
                engine.resume(name)
    return events


@pytest.mark.parametrize("how", ["at once", "paused", "beside one that is aborted", "small pool", "few rows"])
def test_a_crowd_says_what_each_says_alone(talkers: Talkers, alone: dict[str, Tensor], how: str) -> None:
    options = {"small pool": {"num_blocks": 30}, "few rows": {"max_num_seqs": 2, "max_num_batched_tokens": 7}}
    engine = talkers.engine(SPEAKER, (), streamed=("codes",), **options.get(how, {}))
    events = run(engine, crowd(), pauses=how == "paused", aborts=how == "beside one that is aborted")
    for name in CROWD:
        assert len(alone[name]) == FRAMES
        torch.testing.assert_close(codes_of(events, name), alone[name], rtol=0, atol=0)
    if how == "small pool":
        assert engine.get_stats()["num_preemptions"] > 0
    assert_clean(engine)


def test_seeds_draw_the_first_codes_and_the_others(talkers: Talkers) -> None:
    engine = talkers.engine(SPEAKER, (), streamed=("codes",))
    greedy, hot = {"subtalker_temperature": 0}, {"subtalker_temperature": 3.0, "subtalker_top_k": 0}
    params = {seed: SamplingParams(seed=seed, temperature=0, max_tokens=4) for seed in (1, 2)}
    submit(engine, *(make_task(SPEAKER, params[1], f"greedy {place}", **greedy) for place in range(2)))
    submit(engine, *(make_task(SPEAKER, params[seed], f"hot {seed}", **hot) for seed in (1, 2)))
    submit(engine, make_task(SPEAKER, params[1], "again", **hot))
    events = drain(engine)
    said = {name: codes_of(events, name).tolist() for name in ("greedy 0", "greedy 1", "hot 1", "hot 2", "again")}
    assert said["greedy 0"] == said["greedy 1"] and said["hot 1"] == said["again"]
    assert said["hot 1"] != said["hot 2"] != said["greedy 0"]
    assert said["hot 1"][0][0] == said["hot 2"][0][0] == said["greedy 0"][0][0]


def test_only_spoken_codes_are_written_and_the_end_ends(talkers: Talkers) -> None:
    """Drawn hot; not before the second frame, and never where ends are ignored."""
    hot = {"temperature": 30.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "max_tokens": 90}
    engine = talkers.engine(SPEAKER, ("codes",))
    submit(engine, *(make_task(SPEAKER, SamplingParams(seed=s, **hot), str(s), **DRAWN) for s in range(6)))
    submit(engine, make_task(SPEAKER, SamplingParams(seed=0, ignore_eos=True, **hot), "free", **DRAWN))
    done = {event.request_id: event for event in drain(engine) if isinstance(event, StageDone)}
    codes = {name: event.payload.tensors["codes"] for name, event in done.items()}
    assert all(spoken.max() < 64 and spoken.shape[1] == 16 and spoken.dtype == torch.int64 for spoken in codes.values())
    ended = [name for name, event in done.items() if event.payload.meta["finish_reason"] == "stop"]
    assert ended and all(2 <= len(codes[name]) < 90 for name in ended) and len(codes["free"]) == 90
    assert all(done[name].metrics["tokens"] == len(codes[name]) + 1 for name in ended)


def test_equal_beginnings_are_computed_once_and_other_voices_share_nothing(talkers: Talkers) -> None:
    """Written frames are kept by all of their codes: the first of them are equal here."""
    engine = talkers.engine(DESIGN, ("codes",))
    params = SamplingParams(temperature=0, max_tokens=6, seed=1)

    def say(name: str, **fields: Any) -> StageDone:
        submit(engine, make_task(DESIGN, params, name, **fields))
        done = drain(engine)[-1]
        assert isinstance(done, StageDone), done
        return done

    first, again, other = say("first"), say("again"), say("other", instructions="An old woman.")
    assert first.metrics["cache_hits"] == 0 and again.metrics["cache_hits"] >= 20 > other.metrics["cache_hits"]
    torch.testing.assert_close(again.payload.tensors["codes"], first.payload.tensors["codes"], rtol=0, atol=0)
    plain = talkers.engine(DESIGN, ("codes",), prefix_caching=False)
    submit(plain, make_task(DESIGN, params, "other", instructions="An old woman."))
    expected = drain(plain)[-1]
    assert isinstance(expected, StageDone)
    torch.testing.assert_close(other.payload.tensors["codes"], expected.payload.tensors["codes"], rtol=0, atol=0)


def test_logits_that_are_not_finite_fail_their_speech_alone(talkers: Talkers) -> None:
    engine = talkers.engine(SPEAKER, (), streamed=("codes",))
    writer = stage_of(engine)._writer
    plain = writer.write

    def once(states: Tensor, *rest: Any) -> Frames:
        writer.write = plain  # type: ignore[method-assign]
        return plain(states.index_fill(0, torch.tensor([0]), torch.nan), *rest)

    writer.write = once  # type: ignore[method-assign]
    submit(engine, make_task(SPEAKER, name="bad"), make_task(SPEAKER, name="good"))
    events = drain(engine)
    (failed,) = (event for event in events if isinstance(event, StageFailed))
    assert failed.request_id == "bad" and "NaN or infinity" in str(failed.error)
    assert len(codes_of(events, "good")) == 8 and not len(codes_of(events, "bad"))
    assert_clean(engine)


def said(**fields: Any) -> OmniRequest:
    return OmniRequest(prompt=fields.pop("prompt", "Hello"), fields=fields)


SHORT, LONG = (sound(0.1), SAMPLE_RATE), (np.zeros(600 * SAMPLE_RATE, np.float32), SAMPLE_RATE)
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("custom_voice", {"prompt": "  \n"}, "prompt: got .*expected words"),
    ("custom_voice", {"prompt": "a" * 100_001}, "prompt: got 100001 characters, expected at most 100000"),
    ("custom_voice", {"prompt": "a" * 3000}, "prompt: got .* tokens, expected fewer than 512"),
    ("custom_voice", {"prompt": [1, 2]}, "expected the text"),
    ("custom_voice", {"speaker": "ryam"}, "voice: got 'ryam' .did you mean 'ryan'"),
    ("custom_voice", {"speaker": "ryan", "voice": "eric"}, "speaker: got 'ryan' beside voice 'eric'"),
    ("custom_voice", {"language": "klingon"}, "language: got 'klingon'"),
    ("custom_voice", {"language": "sichuan_dialect"}, "language: got 'sichuan_dialect'"),
    ("custom_voice", {"task_type": "Base"}, "task_type: got 'Base', but this checkpoint is for custom_voice"),
    ("custom_voice", {"ref_audio": SHORT}, "ref_audio: got it, but this checkpoint .custom_voice. clones"),
    ("custom_voice", {"subtalker_top_p": 2}, "subtalker_top_p: got 2"),
    ("custom_voice", {"non_streaming_mode": "yes"}, "non_streaming_mode: got 'yes', expected true or false"),
    ("voice_design", {"voice": "ryan"}, "voice: got 'ryan', but this checkpoint .voice_design. has no named"),
    ("voice_design", {"instructions": 5}, "instructions: got 5, expected a text"),
    ("base", {}, "ref_audio: missing"),
    ("base", {"voice": "me"}, "voice: got 'me', but this checkpoint has no voices of its own"),
    ("base", {"instructions": "loudly", "ref_audio": (sound(0.9), SAMPLE_RATE), "ref_text": "a"}, "follows none"),
    ("base", {"ref_audio": (sound(0.9), SAMPLE_RATE)}, "ref_text: missing"),
    ("base", {"ref_audio": SHORT, "x_vector_only_mode": True}, r"got 0\.10 s"),
    ("base", {"ref_audio": LONG, "x_vector_only_mode": True}, r"got 600\.00 s"),
    ("base", {"ref_audio": "nowhere.wav", "x_vector_only_mode": True}, "ref_audio"),
]


@pytest.mark.parametrize(("task", "fields", "complaint"), REFUSED)
def test_what_cannot_be_said_is_refused_at_once(
    talkers: Talkers, task: str, fields: dict[str, Any], complaint: str
) -> None:
    engine = talkers.engine(next(case for case in CASES.values() if case.task == task), max_model_len=512)
    with pytest.raises(InvalidRequestError, match=complaint):
        check(engine, said(**fields), SamplingParams())


@pytest.mark.parametrize(
    ("params", "complaint"),
    [
        (SamplingParams(n=2), "n: got 2, expected 1"),
        (SamplingParams(stop="x"), "stop: speech has no words"),
        (DiffusionParams(), "expected SamplingParams"),
    ],
)
def test_parameters_of_words_are_refused(talkers: Talkers, params: Any, complaint: str) -> None:
    with pytest.raises(InvalidRequestError, match=complaint):
        check(talkers.engine(SPEAKER), said(), params)


@pytest.mark.parametrize(
    ("samples", "complaint"),
    [(np.zeros(SAMPLE_RATE, np.float32), "silence"), (np.full(SAMPLE_RATE, np.nan, np.float32), "NaN")],
)
def test_a_recording_without_a_voice_fails_its_speech_alone(talkers: Talkers, samples: Any, complaint: str) -> None:
    engine = talkers.engine(CLONE)
    submit(engine, make_task(CLONE, name="bad", ref_audio=(samples, SAMPLE_RATE)), make_task(CLONE, name="good"))
    events = drain(engine)
    (failed,) = (event for event in events if isinstance(event, StageFailed))
    assert failed.request_id == "bad" and isinstance(failed.error, OmniError) and complaint in str(failed.error)
    assert any(isinstance(event, StageDone) for event in events)
    assert_clean(engine)


def test_a_kept_voice_is_said_as_its_recording_would_be(talkers: Talkers, tmp_path: Path) -> None:
    engine = talkers.engine(CLONE, voices={"folder": str(tmp_path / "voices")})
    store = make_spec(make_stage(talkers.folders["base"], voices={"folder": str(tmp_path / "voices")})).voices
    assert store is not None
    store.add("me", sound(0.9), text=None, consent="mine")
    named = check(engine, said(voice="me", prompt=CLONE.text, language=CLONE.language), SamplingParams())
    given = check(engine, make_task(CLONE, subtalker_temperature=None).request, SamplingParams())
    assert named.script == given.script and np.array_equal(named.recording[0], given.recording[0])
    with pytest.raises(InvalidRequestError, match="voice: got 'you'"):
        check(engine, said(voice="you"), SamplingParams())


def test_the_memory_plan_is_what_is_then_held(talkers: Talkers) -> None:
    plan = make_spec(make_stage(talkers.folders["voice_design"])).plan_memory()
    engine = talkers.engine(DESIGN)
    stage = stage_of(engine)
    held = sum(parameter.numel() * 4 for parameter in stage._model.parameters())
    assert plan.weights_bytes == held
    assert plan.kv_pool_bytes == engine.get_stats()["kv_pool_bytes"]
    assert plan.activation_bytes > stage._writer._cache.numel() * 4


def test_check_says_what_a_checkpoint_is_for_and_who_speaks(talkers: Talkers) -> None:
    note = make_spec(make_stage(talkers.folders["custom_voice"])).note()
    assert "custom voice" in note and "vivian" in note and "french" in note and "dialect" not in note


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"tts_model_type": "singing"}, "tts_model_type: got 'singing'"),
        ({"vocab_size": 1000}, "vocab_size: got 1000"),
        ({"num_code_groups": 15}, "num_code_groups 15 beside 16"),
        ({"codec_eos_token_id": 9999}, "codec_eos_token_id: got 9999"),
        ({"spk_id": {"ann": -1}}, "spk_id: ann: got -1"),
        ({"spk_is_dialect": {"ryan": "martian"}}, "spk_is_dialect.ryan: got 'martian'"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(changes: dict[str, Any], complaint: str) -> None:
    raw = config("custom_voice")
    own = {key: value for key, value in changes.items() if key.startswith("tts_")}
    raw = {**raw, **own, "talker_config": {**raw["talker_config"], **changes}}
    with pytest.raises(ConfigError, match=complaint):
        TalkerConfig.from_json(raw, "config.json")


@pytest.mark.parametrize("size", ["0.6B", "1.7B"])
@pytest.mark.parametrize("task", TASKS)
def test_every_published_tensor_has_its_place(size: str, task: str) -> None:
    found = TalkerConfig.from_json(published_config(size, task), "config.json")
    assert (found.num_codes, found.predictor.num_codes, found.num_layers) == (16, 15, 28)
    assert found.follows_instructions == ((size, task) == ("1.7B", "custom_voice") or task == "voice_design")
    with torch.device("meta"):
        model = Talker(found)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    filled: dict[str, int] = dict.fromkeys(shapes, 0)
    for name in published_names(size):
        target = model.locate(name)
        assert target is not None, name
        rows = target.rows or slice(0, shapes[target.parameter][0])
        filled[target.parameter] += rows.stop - rows.start
    assert filled == {name: shape[0] for name, shape in shapes.items()}


def published_names(size: str) -> list[str]:
    """As the package's classes name them."""
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "self_attn.q_norm")
    parts += ("self_attn.k_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm")
    parts += ("post_attention_layernorm",)
    names = [f"model.layers.{layer}.{part}.weight" for layer in range(28) for part in parts]
    names += ["model.norm.weight", "model.codec_embedding.weight", "model.text_embedding.weight", "codec_head.weight"]
    names += [f"text_projection.linear_fc{place}.{kind}" for place in (1, 2) for kind in ("weight", "bias")]
    small = [f"model.layers.{layer}.{part}.weight" for layer in range(5) for part in parts] + ["model.norm.weight"]
    small += [name for book in range(15) for name in (f"model.codec_embedding.{book}.weight", f"lm_head.{book}.weight")]
    if size == "1.7B":
        small += ["small_to_mtp_projection.weight", "small_to_mtp_projection.bias"]
    return [f"talker.{name}" for name in (*names, *(f"code_predictor.{name}" for name in small))]
