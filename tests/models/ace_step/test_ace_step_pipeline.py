"""The ACE-Step stage against diffusers' AceStepPipeline, on random small weights in float32."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AceStepPipeline
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from support.ace_step import (
    CHANNELS,
    HOP,
    PORTS,
    READS,
    SAMPLE_RATE,
    Case,
    engine,
    random_pipeline,
    run,
    sound,
    sounds,
    spec,
)
from torch import Tensor

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.engine.base import Activity
from vllm_omni.engine.diffusion.spec import DiffusionSpec
from vllm_omni.errors import CheckpointError, ConfigError, InvalidRequestError
from vllm_omni.messages import StageDone, StageFailed
from vllm_omni.models.ace_step.pipeline import AceStepPipeline as Ours
from vllm_omni.models.ace_step.spec import AceStepSpec
from vllm_omni.models.ace_step.trajectory import ProjectedGuidance, check_sampler
from vllm_omni.params import DiffusionParams
from vllm_omni.payload import DataSpec, TensorSpec
from vllm_omni.request import OmniRequest
from vllm_omni.utils.files import read_json

LYRICS = "[verse]\nover the sea"
CODES = "".join(f"<|audio_code_{n}|>" for n in (3, 63999, 70000, 1234, 0, 9))
TURBO = [
    Case("plain", 1.0, params={"num_inference_steps": 4}),
    Case("words", 2.04, {"lyrics": LYRICS}, {"num_inference_steps": 3, "extra": {"shift": 1.0}}, seed=4),
    Case("default steps", 0.5, {"lyrics": LYRICS}, seed=5),
    Case("cover", 1.0, {"task_type": "cover", "audio": sound(1.3, 1)}, {"num_inference_steps": 2}, seed=1),
    Case(
        "half a cover",
        1.0,
        {
            "task_type": "cover",
            "audio": sound(0.9, 2),
            "reference_audio": sound(12.0, 3),
            "audio_cover_strength": 0.5,
            "lyrics": LYRICS,
        },
        {"num_inference_steps": 2},
        seed=2,
    ),
    Case("codes", 1.2, {"audio_codes": CODES}, {"num_inference_steps": 2}, seed=6),
]
GUIDED = [
    Case("plain", 1.0, params={"num_inference_steps": 4}),
    Case("words", 2.04, {"lyrics": LYRICS}, {"guidance_scale": 3.0, "num_inference_steps": 3}, seed=4),
    Case("unguided", 0.6, {}, {"guidance_scale": 1.0, "num_inference_steps": 3}, seed=7),
    Case(
        "for a while",
        0.8,
        {"lyrics": LYRICS},
        {
            "num_inference_steps": 6,
            "extra": {"cfg_interval_start": 0.2, "cfg_interval_end": 0.7, "shift": 2.0},
        },
        seed=8,
    ),
    Case("own sigmas", 0.8, {}, {"sigmas": [0.95, 0.5, 0.2, 0.05]}, seed=9),
    Case("cover", 1.0, {"task_type": "cover", "audio": sound(1.3, 1)}, {"num_inference_steps": 2}, seed=1),
    Case(
        "half a cover",
        1.0,
        {
            "task_type": "cover",
            "audio": sound(0.9, 2),
            "reference_audio": sound(40.0, 3),
            "audio_cover_strength": 0.25,
        },
        {"num_inference_steps": 2},
        seed=2,
    ),
    Case(
        "repainted",
        1.5,
        {"task_type": "repaint", "audio": sound(1.5, 5), "repainting_start": 0.4, "repainting_end": 1.1},
        {"num_inference_steps": 2},
        seed=3,
    ),
    Case(
        "repainted to the end",
        1.5,
        {"task_type": "repaint", "audio": sound(1.5, 6), "repainting_start": 0.9},
        {"num_inference_steps": 2},
        seed=10,
    ),
    Case(
        "half by codes",
        1.2,
        {"audio_codes": CODES, "audio_cover_strength": 0.5},
        {"num_inference_steps": 2},
        seed=6,
    ),
]


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> tuple[AceStepPipeline, Path]:
    folder = tmp_path_factory.mktemp("guided")
    return random_pipeline(folder), folder


@pytest.fixture(scope="module")
def turbo(tmp_path_factory: pytest.TempPathFactory) -> tuple[AceStepPipeline, Path]:
    folder = tmp_path_factory.mktemp("turbo")
    return random_pipeline(folder, model_version="turbo"), folder


def relative(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("kind, cases", [("turbo", TURBO), ("guided", GUIDED)], ids=["turbo", "guided"])
def test_sounds_of_one_batch_equal_the_reference_pipeline(
    kind: str, cases: list[Case], request: pytest.FixtureRequest
) -> None:
    """Durations, tasks, step counts, guidance and schedules, all in ONE batch."""
    pipeline, folder = request.getfixturevalue(kind)
    stage, known = engine(folder), spec(folder)
    for case in cases:
        task = case.task(pipeline)
        known.check(task.request, task.params, READS)
        stage.submit(task)
    got = sounds(run(stage))
    for case in cases:
        assert relative(got[case.name][0], case.expected(pipeline)) < 1e-3, case.name
    for a, b in zip(cases, cases[1:], strict=False):
        if got[a.name].shape == got[b.name].shape:
            assert relative(got[a.name], got[b.name]) > 0.1, "equal sounds would prove nothing"


def test_a_sound_alone_equals_itself_in_a_crowd_in_another_order_and_again(
    guided: tuple[AceStepPipeline, Path],
) -> None:
    pipeline, folder = guided
    cases = [GUIDED[index] for index in (0, 1, 3, 6)]
    stage = engine(folder)
    found = []
    for batch in (cases, cases[::-1], *[[case] for case in cases]):
        for case in batch:
            stage.submit(case.task(pipeline))
        found.append(sounds(run(stage)))
    crowd, backwards = found[0], found[1]
    for case, alone in zip(cases, found[2:], strict=True):
        assert relative(crowd[case.name], alone[case.name]) < 1e-5, case.name
        assert relative(crowd[case.name], backwards[case.name]) < 1e-5, case.name
    stage.submit(cases[0].task(pipeline))
    assert torch.equal(sounds(run(stage))[cases[0].name], found[2][cases[0].name])


def test_bfloat16_runs_every_task_and_stays_near_float32(guided: tuple[AceStepPipeline, Path]) -> None:
    pipeline, folder = guided
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        stage = engine(folder, dtype=dtype)
        for case in GUIDED:
            stage.submit(case.task(pipeline))
        found.append(sounds(run(stage)))
    exact, rough = found
    assert all(sound.dtype == torch.float32 and sound.isfinite().all() for sound in rough.values())
    for name in ("plain", "words", "unguided"):  # codes of a cover may fall on the other side of a boundary
        assert (rough[name] - exact[name]).norm() < 0.2 * exact[name].norm(), name


def test_output_i_of_a_request_is_the_sound_of_seed_plus_i(guided: tuple[AceStepPipeline, Path]) -> None:
    pipeline, folder = guided
    stage, case = engine(folder), GUIDED[0]
    stage.submit(dataclasses.replace(case, params={**case.params, "num_outputs": 3}).task(pipeline))
    several = sounds(run(stage))[case.name]
    for index in range(3):
        stage.submit(dataclasses.replace(case, seed=index).task(pipeline))
        assert relative(several[index], sounds(run(stage))[case.name][0]) < 1e-5


def test_a_step_cache_of_threshold_0_changes_nothing_and_a_wide_one_skips_steps(
    guided: tuple[AceStepPipeline, Path],
) -> None:
    pipeline, folder = guided
    cases = [GUIDED[index] for index in (0, 1, 6)]
    found, hits = [], []
    for policy, threshold in (("none", None), ("first_block", 0.0), ("first_block", 100.0)):
        stage = engine(folder, policy=policy, threshold=threshold)
        for case in cases:
            stage.submit(case.task(pipeline))
        events = run(stage)
        found.append(sounds(events))
        hits.append(sum(e.metrics["cache_hits"] for e in events.values() if isinstance(e, StageDone)))
    assert hits[0] == hits[1] == 0 and hits[2] > 0
    for case in cases:
        assert relative(found[1][case.name], found[0][case.name]) < 1e-5, case.name
        assert relative(found[2][case.name], found[0][case.name]) > 1e-3, case.name


def test_a_long_sound_is_decoded_piece_by_piece_and_stays_the_same(guided: tuple[AceStepPipeline, Path]) -> None:
    pipeline, folder = guided
    stage, case = engine(folder), GUIDED[1]
    stage.submit(case.task(pipeline))
    whole = sounds(run(stage))[case.name]
    stage.model.vae.frames_of_chunk = 10  # type: ignore[attr-defined]
    stage.submit(case.task(pipeline))
    num_steps, event = 0, None
    while stage.activity() is Activity.BUSY:
        num_steps, event = num_steps + 1, ([event, *stage.step()])[-1]
    assert num_steps == 3 + 6 - 1  # 3 of denoising, the last of which decodes the first of 6 pieces (51 frames)
    assert event is not None and relative(sounds({case.name: event})[case.name], whole) < 1e-5


def test_the_payload_tells_the_rate_and_holds_what_is_wanted(guided: tuple[AceStepPipeline, Path]) -> None:
    pipeline, folder = guided
    stage = engine(folder)
    stage.submit(GUIDED[0].task(pipeline))
    event = run(stage)["plain"]
    assert isinstance(event, StageDone)
    assert event.payload.meta["sample_rate"] == SAMPLE_RATE
    assert event.payload.tensors["audio"].shape == (1, 2, SAMPLE_RATE)
    assert event.payload.tensors["audio"].dtype == torch.float32
    assert event.payload.tensors["latents"].shape == (1, SAMPLE_RATE // HOP, CHANNELS)


def test_loudness_is_levelled_unless_the_request_says_otherwise_and_never_beyond_1() -> None:
    level, keep = DiffusionParams(), DiffusionParams(extra={"normalize": False})
    soft, loud = torch.tensor([[0.1, -0.2]]), torch.tensor([[0.5, -4.0]])
    model = Ours.__new__(Ours)
    assert float(model.assemble([soft[:, :1], soft[:, 1:]], level).abs().max()) == pytest.approx(10 ** (-1 / 20))
    assert float(model.assemble([loud], level).abs().max()) == pytest.approx(10 ** (-1 / 20))
    assert torch.equal(model.assemble([soft], keep), soft)
    assert torch.equal(model.assemble([loud], keep), loud / 4)
    assert torch.equal(model.assemble([torch.zeros(1, 2)], level), torch.zeros(1, 2))


def test_projected_guidance_equals_the_reference_over_many_steps() -> None:
    ours, buffer = ProjectedGuidance(7.0), MomentumBuffer(-0.75)
    for scale in (0.1, 5.0, 0.0, 1.0):
        main, null = torch.randn(40, CHANNELS), torch.randn(40, CHANNELS) * scale
        expected = normalized_guidance(
            main[None], null[None], 6.0, buffer, 0.0, 2.5, use_original_formulation=True, norm_dim=(1,)
        )
        torch.testing.assert_close(ours(main, null), expected[0])


def test_silence_longer_than_the_published_one_is_repeated(guided: tuple[AceStepPipeline, Path]) -> None:
    pipeline, folder = guided
    conditioner = engine(folder).model.conditioner  # type: ignore[attr-defined]
    published = pipeline.condition_encoder.silence_latent[0]
    assert torch.equal(conditioner.silence(40_000), published.repeat(3, 1)[:40_000])


def test_a_planner_that_writes_too_many_codes_makes_no_longer_sound(guided: tuple[AceStepPipeline, Path]) -> None:
    pipeline, folder = guided
    stage, case = engine(folder), Case("codes", 0.8, {"audio_codes": CODES}, {"num_inference_steps": 1})
    stage.submit(case.task(pipeline))
    assert sounds(run(stage))["codes"].shape[2] == 20 * HOP  # 4 of the 6 codes, 5 frames each
    task = case.task(pipeline)
    silent = dataclasses.replace(task, inputs={**task.inputs, "audio_codes": "la la"})
    stage.submit(silent)
    event = run(stage)["codes"]
    assert isinstance(event, StageFailed) and isinstance(event.error, InvalidRequestError)
    assert "got 'la la'" in str(event.error)


def test_the_ports_and_who_reads_them(guided: tuple[AceStepPipeline, Path]) -> None:
    ours = AceStepSpec(guided[1])
    signature = ours.signature
    assert set(signature.inputs) == set(PORTS)
    assert signature.required_inputs == {"prompt_embeds", "lyric_embeds", "music"}
    assert signature.outputs["audio"] == TensorSpec(("N", 2, "n")) and signature.inputs["music"] == DataSpec("music")
    always = {"prompt_embeds", "lyric_embeds", "music"}
    for fields, more in (
        ({}, {"audio_codes"}),
        ({"audio": None, "audio_codes": CODES}, {"audio_codes"}),
        ({"task_type": "cover", "audio": 1}, {"source_audio"}),
        ({"task_type": "repaint", "audio": 1, "reference_audio": 1}, {"source_audio", "reference_audio"}),
        ({"task_type": "cover", "audio": 1, "audio_cover_strength": 0.9}, {"source_audio", "plain_prompt_embeds"}),
        ({"task_type": "cover", "audio": 1, "audio_cover_strength": 1.0}, {"source_audio"}),
    ):
        request = OmniRequest(prompt="x", fields=fields)
        needed = ours.needed_inputs(frozenset(PORTS), request, DiffusionParams())
        assert needed == always | more, fields
        assert ours.needed_inputs(frozenset(always), request, DiffusionParams()) == always


def test_the_modulated_input_is_what_the_first_block_attends_with(guided: tuple[AceStepPipeline, Path]) -> None:
    stage, seen = engine(guided[1], cache={"policy": "recording", "signal": "modulated_input"}), []
    given = stage.model.modulated_input
    stage.model.modulated_input = lambda tokens: seen.append(given(tokens)) or seen[-1]  # type: ignore[method-assign]
    attended: list[Tensor] = []
    block = stage.model.transformer.layers[0]  # type: ignore[attr-defined]
    handle = block.self_attn.register_forward_pre_hook(lambda _, arguments: attended.append(arguments[0]))
    for case in GUIDED[:2]:
        stage.submit(case.task(guided[0]))
    run(stage)
    handle.remove()
    assert attended and all(torch.equal(torch.cat(a), b) for a, b in zip(seen, attended, strict=True))


def check(stage: DiffusionSpec, params: dict[str, Any], fields: dict[str, Any] | None = None, **request: Any) -> None:
    stage.check(OmniRequest(prompt="x", fields=fields or {}, **request), DiffusionParams(**params), READS)


@pytest.mark.parametrize(
    "params, words",
    [
        ({"height": 64}, "height: ACE-Step"),
        ({"strength": 0.5}, "strength: ACE-Step"),
        ({"negative_prompt": "drums"}, "negative_prompt: ACE-Step"),
        ({"output_type": "pil"}, "output_type: got 'pil'"),
        ({"duration_s": 601.0}, "duration_s: got 601.0, expected .*at most 600"),
        ({"guidance_scale": 101.0}, "guidance_scale: got 101.0"),
        ({"extra": {"shft": 1.0}}, r"extra\.shft: unknown key \(did you mean 'shift'"),
        ({"extra": {"shift": 0}}, r"extra\.shift: got 0"),
        ({"extra": {"shift": 2.0}, "sigmas": [1.0, 0.5]}, r"extra\.shift: got it beside sigmas"),
        ({"extra": {"normalize": 1}}, r"extra\.normalize: got 1, expected true or false"),
        ({"extra": {"cfg_interval_end": 1.5}}, r"extra\.cfg_interval_end: got 1\.5"),
        ({"extra": {"cfg_interval_start": 0.6, "cfg_interval_end": 0.5}}, "cfg_interval_start: got 0.6"),
        ({"extra": {"cfg_interval_start": 0.6}, "guidance_scale": 1.0}, "nothing reads it without guidance"),
        ({"extra": {"cfg_interval_end": 0.6}, "guidance_interval": [0, 0.5]}, "got it beside guidance_interval"),
        ({"num_inference_steps": 2, "guidance_interval": [0.4, 0.6]}, "which holds none of 2 steps"),
    ],
)
def test_parameters_that_cannot_act_are_refused(
    params: dict[str, Any], words: str, guided: tuple[AceStepPipeline, Path]
) -> None:
    stage = spec(guided[1])
    check(stage, {})
    with pytest.raises(InvalidRequestError, match=words):
        check(stage, params)


def test_a_turbo_model_refuses_guidance_and_is_content_with_1(turbo: tuple[AceStepPipeline, Path]) -> None:
    stage = spec(turbo[1])
    check(stage, {"guidance_scale": 1.0})
    with pytest.raises(InvalidRequestError, match=r"guidance_scale: got 7, but guidance is distilled"):
        check(stage, {"guidance_scale": 7.0})
    with pytest.raises(InvalidRequestError, match="nothing reads it without guidance"):
        check(stage, {"extra": {"cfg_interval_end": 0.5}})
    with pytest.raises(InvalidRequestError, match="guidance_interval: guidance is distilled"):
        check(stage, {"guidance_interval": [0, 0.5]})


def test_an_interval_of_the_steps_is_the_interval_of_noise_levels_that_holds_the_same_steps(
    guided: tuple[AceStepPipeline, Path],
) -> None:
    """Without a shift the noise levels of six steps are 1, 5/6, .. 1/6."""
    settings = {"num_inference_steps": 6, "guidance_scale": 3.0}
    by_steps = Case("steps", 0.8, params={**settings, "extra": {"shift": 1.0}, "guidance_interval": [1 / 3, 2 / 3]})
    levels = {"shift": 1.0, "cfg_interval_start": 0.3, "cfg_interval_end": 0.6}
    by_levels = Case("levels", 0.8, params={**settings, "extra": levels})
    everywhere = Case("everywhere", 0.8, params={**settings, "extra": {"shift": 1.0}})
    stage = engine(guided[1])
    for case in (by_steps, by_levels, everywhere):
        stage.submit(case.task(guided[0]))
    got = sounds(run(stage))
    assert torch.equal(got["steps"], got["levels"]) and not torch.equal(got["steps"], got["everywhere"])


def test_a_weak_cover_needs_the_plain_words(guided: tuple[AceStepPipeline, Path]) -> None:
    fields = {"task_type": "cover", "audio": "x.wav", "audio_cover_strength": 0.5}
    check(spec(guided[1]), {}, fields)
    stage = spec(guided[1], ports=tuple(port for port in PORTS if port != "plain_prompt_embeds"))
    with pytest.raises(InvalidRequestError, match=r"audio_cover_strength: got 0\.5.*plain_prompt_embeds"):
        check(stage, {}, fields)


def test_a_duration_that_the_prompt_is_not_for_is_refused(guided: tuple[AceStepPipeline, Path]) -> None:
    pipeline, folder = guided
    stage, case = engine(folder), GUIDED[0]
    for duration_s, fits in ((1.0, True), (2.0, False)):
        stage.submit(dataclasses.replace(case, params={**case.params, "duration_s": duration_s}).task(pipeline))
        event = run(stage)[case.name]
        assert isinstance(event, StageDone) is fits
        if isinstance(event, StageFailed):
            assert isinstance(event.error, InvalidRequestError)
            assert "duration_s: got 2, but the prompt is for 1 s" in str(event.error)


def test_a_folder_without_audio_tokenizer_makes_music_but_no_covers(tmp_path: Path) -> None:
    parts = {"audio_tokenizer": None, "audio_token_detokenizer": None}
    pipeline = random_pipeline(tmp_path, parts)
    stage = engine(tmp_path)
    stage.submit(GUIDED[2].task(pipeline))
    assert relative(sounds(run(stage))["unguided"][0], GUIDED[2].expected(pipeline)) < 1e-3
    for fields in ({"task_type": "cover", "audio": "x.wav"}, {"audio_codes": CODES}):
        with pytest.raises(InvalidRequestError, match="a cover needs audio_tokenizer"):
            check(spec(tmp_path), {}, fields)


def test_folders_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    random_pipeline(tmp_path)
    scheduler = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    for change, words in (
        ({"num_train_timesteps": 1000}, "num_train_timesteps: got 1000, expected 1"),
        ({"stochastic_sampling": True}, "stochastic_sampling: got True"),
        ({"_class_name": "EulerDiscreteScheduler"}, "got 'EulerDiscreteScheduler'"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_sampler({**scheduler, **change}, "x")
    weights = tmp_path / "condition_encoder" / "diffusion_pytorch_model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    save_file({name: tensor for name, tensor in tensors.items() if name != "silence_latent"}, weights)
    with pytest.raises(CheckpointError, match=r"missing keys.*silence_latent"):
        AceStepSpec(tmp_path).load(torch.device("cpu"), torch.float32)
    save_file(tensors, weights)
    file = tmp_path / "transformer" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "in_channels": 9}))
    with pytest.raises(ConfigError, match="in_channels: got 9"):
        AceStepSpec(tmp_path).load(torch.device("cpu"), torch.float32)


def test_memory_is_planned_from_headers_alone(guided: tuple[AceStepPipeline, Path]) -> None:
    pipeline, folder = guided
    parts = (pipeline.transformer, pipeline.vae, *pipeline_parts(pipeline))
    expected = sum(tensor.numel() for part in parts for tensor in part.state_dict().values())
    ours = AceStepSpec(folder)
    assert ours.weights_bytes(torch.bfloat16) == 2 * expected
    assert ours.token_bytes(torch.float32) == 2 * ours.token_bytes(torch.bfloat16) > 0


def pipeline_parts(pipeline: AceStepPipeline) -> tuple[Any, ...]:
    return pipeline.condition_encoder, pipeline.audio_tokenizer, pipeline.audio_token_detokenizer


def test_longer_guided_and_more_steps_are_larger_jobs(guided: tuple[AceStepPipeline, Path]) -> None:
    ours = AceStepSpec(guided[1])

    def size(fields: dict[str, Any], **params: Any) -> float:
        return ours.job_size(OmniRequest(prompt="x", fields=fields), DiffusionParams(**params))

    assert size({"duration_s": 2.0}) == 2 * size({"duration_s": 1.0})
    assert size({}, duration_s=2.0) == size({"duration_s": 2.0}) < size({})
    assert size({}) == 2 * size({}, guidance_scale=1.0)
    assert size({}, num_inference_steps=16) == 2 * size({})


def test_limits_are_the_configs(guided: tuple[AceStepPipeline, Path]) -> None:
    ours = AceStepSpec(guided[1])
    request, params = OmniRequest(prompt="x"), DiffusionParams(duration_s=5.0)
    ours.check(request, params, frozenset(PORTS), LimitsConfig(max_duration_s=5.0))
    with pytest.raises(InvalidRequestError, match="limits"):
        ours.check(request, params, frozenset(PORTS), LimitsConfig(max_duration_s=4.9))


def test_source_and_reference_audio_are_heavy_and_words_and_codes_are_not(
    guided: tuple[AceStepPipeline, Path],
) -> None:
    pipeline, folder = guided
    model = engine(folder).model
    assert {case.name for case in GUIDED if model.is_heavy(case.inputs(pipeline), DiffusionParams())} == {
        "cover",
        "half a cover",
        "repainted",
        "repainted to the end",
    }


def test_every_json_file_is_read_once_and_none_for_a_request(
    guided: tuple[AceStepPipeline, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    monkeypatch.setattr(
        "vllm_omni.models.ace_step.folder.read_json", lambda path: (read.append(path), read_json(path))[1]
    )
    ours = AceStepSpec(guided[1])
    found = sorted(str(path.relative_to(guided[1])) for path in read)
    assert found == [
        "audio_token_detokenizer/config.json",
        "condition_encoder/config.json",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "vae/config.json",
    ]
    request = OmniRequest(prompt="x")
    ours.check(request, DiffusionParams(), frozenset(PORTS), LimitsConfig())
    ours.needed_inputs(frozenset(PORTS), request, DiffusionParams())
    ours.job_size(request, DiffusionParams())
    assert len(read) == len(found)


def test_parts_that_do_not_fit_the_transformer_or_make_no_sense_are_refused_before_loading(tmp_path: Path) -> None:
    random_pipeline(tmp_path)
    for file, change, words in (
        ("vae/config.json", {"decoder_input_channels": 9}, "decoder_input_channels: got 9, expected 8"),
        ("vae/config.json", {"channel_multiples": [1]}, "two lists of equal length"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 1000}, "num_train_timesteps: got 1000"),
        ("audio_token_detokenizer/config.json", {"pool_window_size": 0}, "pool_window_size: got 0"),
        ("condition_encoder/config.json", {"text_hidden_dim": None}, "text_hidden_dim: got None"),
    ):
        path = tmp_path / file
        before = path.read_text()
        path.write_text(json.dumps({**json.loads(before), **change}))
        with pytest.raises(ConfigError, match=words):
            AceStepSpec(tmp_path)
        path.write_text(before)
    AceStepSpec(tmp_path)
