"""The adapter stage: what it makes equals the hosted pipeline's own, one step at a time, and nothing is left behind."""

from __future__ import annotations

import json
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableAudioPipeline, ZImagePipeline
from support.diffusers_folders import RATE, engine, made, random_stable_audio, random_z_image, run, step, task
from support.engines import spec_of

from vllm_omni import Omni
from vllm_omni.config.loader import load_config
from vllm_omni.config.schema import LimitsConfig, StageConfig
from vllm_omni.engine.base import ReadPorts
from vllm_omni.engine.diffusers.engine import DiffusersEngine
from vllm_omni.engine.diffusers.options import DiffusersOptions
from vllm_omni.entrypoints.cli.graph_report import describe
from vllm_omni.errors import ConfigError, InvalidRequestError, StageError
from vllm_omni.executor.memory import plan_memory
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.messages import StageDone, StageFailed, StageProgress
from vllm_omni.params import DiffusionParams
from vllm_omni.request import OmniRequest


@pytest.fixture(scope="module")
def audio(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StableAudioPipeline]:
    folder = tmp_path_factory.mktemp("stable-audio")
    return folder, random_stable_audio(folder)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ZImagePipeline]:
    folder = tmp_path_factory.mktemp("z-image")
    return folder, random_z_image(folder)


def check(stage: DiffusersEngine, request: OmniRequest, value: DiffusionParams) -> None:
    """As the stage's spec checks a request before it is admitted."""
    stage.spec.check(request, value, ReadPorts())


@pytest.fixture(scope="module")
def sounds(audio: tuple[Path, StableAudioPipeline]) -> DiffusersEngine:
    return engine(audio[0], "audio")


@pytest.fixture(scope="module")
def pictures(picture: tuple[Path, ZImagePipeline]) -> DiffusersEngine:
    return engine(picture[0], "image")


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name.endswith("Pipeline call")]


def params(seed: int = 1, **rest: Any) -> DiffusionParams:
    return DiffusionParams(**{"seed": seed, "num_inference_steps": 3, "duration_s": 0.5, **rest})


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_sound_is_the_pipelines_own(audio: tuple[Path, StableAudioPipeline], sounds: DiffusersEngine) -> None:
    value = params(7, guidance_scale=3.0, negative_prompt="noise", num_inference_steps=4)
    check(sounds, task("x", "a bell", value).request, value)
    sounds.submit(task("x", "a bell", value))
    events = run(sounds)
    expected = audio[1](
        "a bell",
        negative_prompt="noise",
        audio_end_in_s=0.5,
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=generator(7),
    ).audios
    got = made(events, "audio")["x"]
    assert got.shape == (1, 2, RATE // 2) and got.dtype == torch.float32 and torch.equal(got, expected)
    steps = [(event.step, event.num_steps) for event in events if isinstance(event, StageProgress)]
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)], "one event for each denoising step"
    done = events[-1]
    assert isinstance(done, StageDone) and done.payload.meta == {"sample_rate": RATE} and done.metrics["steps"] == 4


def test_the_prompt_and_all_parameters_reach_the_pipeline(sounds: DiffusersEngine) -> None:
    variants = {
        "base": ("a bell", params()),
        "prompt": ("a drum", params()),
        "seed": ("a bell", params(2)),
        "steps": ("a bell", params(num_inference_steps=2)),
        "guidance": ("a bell", params(guidance_scale=2.0)),
        "negative": ("a bell", params(negative_prompt="noise")),
        "start": ("a bell", params(extra={"audio_start_in_s": 0.25})),
    }
    for key, (prompt, value) in variants.items():
        sounds.submit(task(key, prompt, value))
    got = made(run(sounds), "audio")
    for key in variants.keys() - {"base"}:
        assert got[key].shape == got["base"].shape, "a duration is a length, wherever it starts"
        assert not torch.equal(got[key], got["base"]), key
    sounds.submit(task("long", "a bell", params(duration_s=1.0)))
    assert made(run(sounds), "audio")["long"].shape[-1] == RATE


def test_a_picture_is_the_pipelines_own(picture: tuple[Path, ZImagePipeline], pictures: DiffusersEngine) -> None:
    settings: dict[str, Any] = dict(height=32, width=64, num_inference_steps=3, guidance_scale=2.0)
    value = DiffusionParams(seed=5, num_outputs=2, extra={"cfg_normalization": True}, **settings)
    request = task("x", "a circle", value, negative_prompt="blur")
    check(pictures, request.request, value)
    pictures.submit(request)
    events = run(pictures)
    expected = picture[1](
        "a circle",
        negative_prompt="blur",
        cfg_normalization=True,
        num_images_per_prompt=2,
        generator=[generator(5), generator(6)],
        **settings,
    ).images
    got = made(events, "image")["x"]
    assert got.shape == (2, 32, 64, 3) and got.dtype == torch.uint8
    assert np.array_equal(got.numpy(), np.stack([np.asarray(each) for each in expected]))
    assert sum(isinstance(event, StageProgress) for event in events) == 3


def test_requests_run_one_after_another_and_equal_those_alone(sounds: DiffusersEngine) -> None:
    alone = {}
    for seed in range(3):
        sounds.submit(task(f"{seed}", "a bell", params(seed, num_inference_steps=2 + seed)))
        alone |= made(run(sounds), "audio")
    for seed in range(3):
        sounds.submit(task(f"{seed}", "a bell", params(seed, num_inference_steps=2 + seed)))
    first = step(sounds)
    assert [event.request_id for event in first] == ["0"]
    assert sounds.get_stats() == {"running": 1, "queued": 2}
    events = first + run(sounds)
    assert [event.request_id for event in events] == ["0"] * 3 + ["1"] * 4 + ["2"] * 5
    for key, sound in made(events, "audio").items():
        assert torch.equal(sound, alone[key]), key


def test_output_i_is_seed_plus_i(sounds: DiffusersEngine, pictures: DiffusersEngine) -> None:
    small = dict(num_inference_steps=2, guidance_scale=0.0, height=32, width=32)
    for stage, port, rest in ((sounds, "audio", {}), (pictures, "image", {"duration_s": None, **small})):
        for key, value in {
            "two": params(7, num_outputs=2, **rest),
            "0": params(7, **rest),
            "1": params(8, **rest),
        }.items():
            stage.submit(task(key, "a bell", value))
        got = {key: tensor.double() for key, tensor in made(run(stage), port).items()}
        near = 1.0 if port == "image" else 1e-4
        assert all((got["two"][index] - got[str(index)][0]).abs().max() <= near for index in range(2))
        assert (got["two"][0] - got["two"][1]).abs().max() > 10 * near


@pytest.mark.parametrize("num_steps_done", [1, 2])
def test_an_abort_on_the_way_ends_the_call_at_once(sounds: DiffusersEngine, num_steps_done: int) -> None:
    sounds.submit(task("after", "a bell", params(4)))
    expected = made(run(sounds), "audio")["after"]
    sounds.submit(task("gone", "a drum", params(3, num_inference_steps=50)))
    sounds.submit(task("queued", "a drum", params(3)))
    sounds.submit(task("after", "a bell", params(4)))
    for _ in range(num_steps_done):
        assert [event.request_id for event in step(sounds)] == ["gone"]
    sounds.abort("gone")
    sounds.abort("queued")
    sounds.abort("never seen")
    assert sounds.get_stats() == {"running": 0, "queued": 1}
    got = made(run(sounds), "audio")
    assert set(got) == {"after"} and torch.equal(got["after"], expected)


def test_a_failure_on_the_way_fails_its_request_alone(
    audio: tuple[Path, StableAudioPipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = engine(audio[0], "audio")
    transformer = stage.host.pipeline.transformer
    whole, calls = type(transformer).forward, []

    def breaks_at_its_second_step(self: Any, *arguments: Any, **rest: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("out of memory")
        return whole(self, *arguments, **rest)

    monkeypatch.setattr(type(transformer), "forward", breaks_at_its_second_step)
    stage.submit(task("bad", "a bell", params(1)))
    stage.submit(task("good", "a bell", params(2)))
    events = run(stage)
    assert [type(event) for event in events[:2]] == [StageProgress, StageFailed]
    failed = events[1]
    assert isinstance(failed, StageFailed) and failed.request_id == "bad"
    assert isinstance(failed.error, StageError) and "out of memory" in str(failed.error)
    expected = audio[1]("a bell", audio_end_in_s=0.5, num_inference_steps=3, generator=generator(2)).audios
    assert torch.equal(made(events[2:], "audio")["good"], expected)


def test_what_only_the_pipeline_can_check_fails_the_request(sounds: DiffusersEngine) -> None:
    sounds.submit(task("long", "a bell", params(duration_s=100.0)))
    (event,) = run(sounds)
    assert isinstance(event, StageFailed) and "length" in str(event.error)


def test_a_forgotten_stage_ends_its_thread(audio: tuple[Path, StableAudioPipeline]) -> None:
    stage = engine(audio[0], "audio")
    stage.submit(task("x", "a bell", params()))
    step(stage)
    assert any(thread.name == "StableAudioPipeline call" for thread in threading.enumerate())
    del stage


def test_a_pipeline_without_a_callback_runs_whole_in_one_step(
    sounds: DiffusersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sounds.submit(task("x", "a bell", params()))
    expected = made(run(sounds), "audio")["x"]
    whole = StableAudioPipeline.__call__

    def call(self: Any, prompt: str, audio_end_in_s: float, num_inference_steps: int, generator: Any) -> Any:
        return whole(
            self, prompt, audio_end_in_s=audio_end_in_s, num_inference_steps=num_inference_steps, generator=generator
        )

    monkeypatch.setattr(StableAudioPipeline, "__call__", call)
    sounds.submit(task("x", "a bell", params()))
    (event,) = step(sounds)
    assert isinstance(event, StageDone) and torch.equal(event.payload.tensors["audio"], expected)


def test_attention_processors_of_an_aborted_call_are_put_back(picture: tuple[Path, ZImagePipeline]) -> None:
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    from vllm_omni.engine.diffusers.pipeline_host import PipelineHost

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
    )

    host = PipelineHost(types.SimpleNamespace(components={"unet": unet}))
    unet.set_attn_processor(AttnProcessor())
    host.restore()
    assert all(isinstance(each, AttnProcessor2_0) for each in unet.attn_processors.values())


def test_a_text_edge_replaces_the_prompt(audio: tuple[Path, StableAudioPipeline], sounds: DiffusersEngine) -> None:
    sounds.submit(task("x", "a bell", params()))
    expected = made(run(sounds), "audio")["x"]
    stage = engine(audio[0], "audio", inputs={"prompt": "writer.text"})
    assert stage.spec.signature.required_inputs == {"prompt"}
    given = task("x", "something else", params())
    stage.submit(type(given)(given.request, "stage", given.params, {"prompt": "a bell"}))
    assert torch.equal(made(run(stage), "audio")["x"], expected)


BAD_SOUNDS: list[tuple[dict[str, Any], str]] = [
    ({"height": 64}, r"height: StableAudioPipeline does not take it"),
    ({"sigmas": [1.0, 0.5], "num_inference_steps": None}, "sigmas: StableAudioPipeline"),
    ({"strength": 0.5}, "strength: StableAudioPipeline"),
    ({"extra": {"audio_begin_in_s": 1.0}}, r"extra\.audio_begin_in_s: unknown key \(did you mean 'audio_start_in_s'"),
    ({"extra": {"audio_end_in_s": 1.0}}, r"extra\.audio_end_in_s.*duration_s"),
    ({"extra": {"callback_steps": 2}}, r"extra\.callback_steps: unknown key"),
    ({"extra": {"output_type": "latent"}}, r"extra\.output_type: unknown key"),
    ({"extra": {"eta": float("nan")}}, r"extra\.eta"),
    ({"extra": {"audio_start_in_s": -1.0}}, r"extra\.audio_start_in_s"),
    ({"num_inference_steps": 10**6}, "num_inference_steps"),
    ({"guidance_scale": 1e6}, "guidance_scale"),
    ({"num_outputs": 1000}, "num_outputs"),
    ({"duration_s": 1e5}, r"duration_s.*limits"),
    ({"output_type": "latent"}, "output_type"),
    ({"negative_prompt": "x" * 200_000}, "negative_prompt.*max_prompt_chars"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_SOUNDS, ids=[message[:30] for _, message in BAD_SOUNDS])
def test_what_a_pipeline_does_not_take_is_refused_with_its_name(
    sounds: DiffusersEngine, bad: dict[str, Any], message: str
) -> None:
    value = params(**bad)
    with pytest.raises(InvalidRequestError, match=message):
        check(sounds, task("x", "a bell", value).request, value)


BAD_PICTURES: list[tuple[dict[str, Any], str]] = [
    ({"duration_s": 1.0}, "duration_s: ZImagePipeline"),
    ({"height": 100_000, "width": 10_000}, r"height \* width.*limits"),
    ({"height": 100_000}, r"height \* width.*limits"),
    ({"sigmas": [1.0, 0.5], "num_inference_steps": 3}, "sigmas"),
    ({"extra": {"num_images_per_prompt": 4}}, "num_outputs"),
    ({"extra": {"max_sequence_length": float("inf")}}, "max_sequence_length"),
    ({"image": "a path"}, "image"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_PICTURES, ids=[message[:30] for _, message in BAD_PICTURES])
def test_pictures_have_limits_too(pictures: DiffusersEngine, bad: dict[str, Any], message: str) -> None:
    value = DiffusionParams(**bad)
    with pytest.raises(InvalidRequestError, match=message):
        check(pictures, task("x", "a circle", value).request, value)


def test_a_prompt_that_is_no_text_or_too_long_is_refused(audio: tuple[Path, StableAudioPipeline]) -> None:
    stage = engine(audio[0], "audio", limits=LimitsConfig(max_prompt_chars=5))
    for prompt, message in (([1, 2], "prompt: got list"), ("a long one", "prompt: got 10 characters")):
        with pytest.raises(InvalidRequestError, match=message):
            check(stage, task("x", prompt, params()).request, params())  # type: ignore[arg-type]
    check(stage, task("x", "short", params()).request, params())


def test_a_shorter_list_of_sigmas_is_the_schedule(
    picture: tuple[Path, ZImagePipeline], pictures: DiffusersEngine
) -> None:
    value = DiffusionParams(seed=3, height=32, width=32, guidance_scale=0.0, sigmas=[1.0, 0.5])
    check(pictures, task("x", "a circle", value).request, value)
    pictures.submit(task("x", "a circle", value))
    events = run(pictures)
    assert sum(isinstance(event, StageProgress) for event in events) == 2
    settings = dict(height=32, width=32, guidance_scale=0.0, sigmas=[1.0, 0.5])
    expected = picture[1]("a circle", generator=generator(3), **settings).images[0]
    assert np.array_equal(made(events, "image")["x"][0].numpy(), np.asarray(expected))


# Folders


def stage_of(folder: Path, **options: Any) -> StageConfig:
    return StageConfig(name="s", kind="diffusers", model=str(folder), options=DiffusersOptions(**options))


def test_the_signature_and_the_memory_plan_read_no_weights(audio: tuple[Path, StableAudioPipeline]) -> None:
    stage = stage_of(audio[0], output="audio")
    signature = spec_of(stage).signature
    assert set(signature.outputs) == signature.results == {"audio"} and set(signature.inputs) == {"prompt"}
    assert not signature.required_inputs
    modules = [each for each in audio[1].components.values() if isinstance(each, torch.nn.Module)]
    expected = sum(weight.numel() * 4 for module in modules for weight in module.state_dict().values())
    planned = spec_of(stage).plan_memory().weights_bytes
    assert 0.9 * expected < planned <= 1.1 * expected


def write_index(folder: Path, **entries: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("index", "options", "message"),
    [
        ({"_class_name": "StableAudioPipelin"}, {}, "did you mean 'StableAudioPipeline'"),
        ({"_class_name": ["my_code", "MyPipeline"]}, {}, "custom code is not run"),
        ({"_class_name": "DiffusionPipeline"}, {}, "_class_name: got 'DiffusionPipeline'"),
        ({"_class_name": "AutoencoderKL"}, {}, "_class_name: got 'AutoencoderKL'"),
        ({"_class_name": "StableAudioPipeline"}, {"pipeline": "os.system"}, "pipeline: got 'os.system'"),
    ],
)
def test_only_pipelines_of_diffusers_are_hosted(
    tmp_path: Path, index: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        spec_of(stage_of(write_index(tmp_path, **index), output="audio", **options))


def test_a_folder_with_code_or_foreign_libraries_is_refused(tmp_path: Path) -> None:
    foreign = write_index(tmp_path / "foreign", _class_name="StableAudioPipeline", vae=["os", "system"])
    with pytest.raises(ConfigError, match=r"vae: got \['os', 'system'\].*custom code"):
        engine(foreign, "audio")
    scripted = write_index(tmp_path / "scripted", _class_name="StableAudioPipeline", vae=["diffusers", "AutoencoderKL"])
    (scripted / "vae").mkdir()
    (scripted / "vae" / "diffusers.py").write_text("raise SystemExit")
    with pytest.raises(ConfigError, match=r"diffusers\.py: a checkpoint with code"):
        engine(scripted, "audio")


def test_a_pipeline_for_pictures_has_no_sample_rate(picture: tuple[Path, ZImagePipeline]) -> None:
    with pytest.raises(ConfigError, match="no sample rate"):
        engine(picture[0], "audio")


def test_what_a_pipeline_makes_is_found_and_may_be_said(audio: tuple[Path, StableAudioPipeline]) -> None:
    stage = {"kind": "diffusers", "model": str(audio[0])}
    pipeline = Pipeline(load_config({"stages": {"s": stage}, "outputs": ["s"]}))
    assert pipeline.specs["s"].signature.results == {"audio"}
    with pytest.raises(ConfigError, match=r"stages\.s\.output: got 'film'"):
        load_config({"stages": {"s": {**stage, "output": "film"}}, "outputs": ["s"]})


# The whole way


def test_pictures_come_out_of_a_graph(picture: tuple[Path, ZImagePipeline]) -> None:
    stage = {"kind": "diffusers", "output": "image", "model": str(picture[0])}
    value = DiffusionParams(seed=3, height=32, width=32, guidance_scale=0.0, num_inference_steps=2)
    with Omni({"stages": {"s": stage}, "outputs": ["s"]}, progress=False) as omni:
        good, bad = omni.generate(["a circle", "a circle"], [value, DiffusionParams(duration_s=2.0)])
    settings = dict(height=32, width=32, guidance_scale=0.0, num_inference_steps=2)
    expected = picture[1]("a circle", generator=generator(3), **settings).images[0]
    assert good.error is None and np.array_equal(np.asarray(good.images[0]), np.asarray(expected))
    assert isinstance(bad.error, InvalidRequestError) and "duration_s" in str(bad.error)


def test_a_stable_audio_folder_alone_makes_sounds(audio: tuple[Path, StableAudioPipeline]) -> None:
    with Omni(model=str(audio[0]), progress=False) as omni:
        (output,) = omni.generate("a bell", DiffusionParams(seed=3, duration_s=1.0, num_inference_steps=2))
    expected = audio[1](
        "a bell", audio_end_in_s=1.0, num_inference_steps=2, guidance_scale=7.0, generator=generator(3)
    ).audios
    (sound,) = output.audios
    assert sound.sample_rate == RATE and np.array_equal(sound.samples, expected[0].numpy())


def test_the_shipped_config_fits_a_stable_audio_folder(
    audio: tuple[Path, StableAudioPipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_omni.config.shipped import config_for_model

    assert config_for_model(audio[0]).stem == "stable_audio"
    monkeypatch.setenv("OMNI_MODEL", str(audio[0]))
    config = load_config("stable_audio")
    pipeline = Pipeline(config)
    report = describe(pipeline, plan_memory(pipeline))
    assert "audio · diffusers" in report and "one after another" in report
