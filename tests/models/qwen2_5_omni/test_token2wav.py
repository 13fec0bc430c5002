"""Token2wav against transformers' implementation, and what a request may depend on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.dit import encoded_images
from support.speech import SPEAKERS, TOKEN2WAV, save_tiny_omni, tiny_config, tiny_reference, tiny_speakers
from support.token2wav import (
    MEL,
    SAMPLES,
    SPEECH_YAML,
    codes,
    engine,
    params,
    reference_sound,
    register_spell,
    run,
    sound,
    spec,
    task,
)

from vllm_omni.engine.base import Activity, ReadPorts
from vllm_omni.entrypoints.cli import main
from vllm_omni.errors import CheckpointError, ConfigError, InvalidRequestError, StageError
from vllm_omni.layers.weights import plan_loading
from vllm_omni.messages import StageDone, StageFailed, StageProgress
from vllm_omni.models.qwen2_5_omni.token2wav.config import Token2WavConfig
from vllm_omni.models.qwen2_5_omni.token2wav.model import Token2WavModules
from vllm_omni.models.qwen2_5_omni.token2wav.trajectory import RungeKuttaSampler, frame_noise, time_points
from vllm_omni.params import DiffusionParams
from vllm_omni.request import OmniRequest
from vllm_omni.worker.model_pool import ModelPool

POOL = ModelPool()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_omni(tmp_path_factory.mktemp("omni"))


def assert_near(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(
    "length, value, speaker",
    [
        (1, params(4), SPEAKERS[0]),
        (3, params(4, 0.0, seed=1), SPEAKERS[1]),
        (17, params(10, None, seed=2), SPEAKERS[0]),
        (17, params(10, 0.0, seed=3), SPEAKERS[0]),
        (36, params(5, 2.0, seed=4), SPEAKERS[1]),
        (50, params(2, 1e-6, seed=5), SPEAKERS[0]),
    ],
)
def test_the_waveform_is_the_reference_s(folder: Path, length: int, value: DiffusionParams, speaker: str) -> None:
    rows = codes(length, seed=length)
    got = sound(engine(folder, pool=POOL), rows, value, speaker=speaker)
    expected = reference_sound(rows, value, speaker)
    assert got.shape == (1, length * SAMPLES) and 0.01 < expected.abs().max() < 0.99
    assert_near(got, expected, 1e-3)


def test_layers_compute_in_another_dtype_where_the_stage_names_it(folder: Path) -> None:
    rows, expected = codes(9), reference_sound(codes(9), params())
    stage = engine(folder, dtype="bfloat16")
    assert stage.model.transformer.dtype == torch.bfloat16
    others = [weight for name, weight in stage.model.transformer.named_parameters() if not name.startswith("layers.")]
    assert {weight.dtype for weight in [*others, *stage.model.vocoder.parameters()]} == {torch.float32}
    got = sound(stage, rows, params())
    assert_near(got, expected, 0.01)
    with pytest.raises(AssertionError):
        assert_near(got, expected, 1e-4)


def test_ten_points_are_36_steps_of_one_evaluation_each(folder: Path) -> None:
    stage = engine(folder, pool=POOL)
    stage.submit(task("x", codes(4), DiffusionParams(seed=1)))
    steps = [event for _ in range(40) for event in stage.step()]
    assert [(e.step, e.num_steps) for e in steps if isinstance(e, StageProgress)] == [(n, 36) for n in range(1, 37)]
    assert stage.activity() is Activity.IDLE
    default = sound(stage, codes(4), DiffusionParams(seed=1))
    assert torch.equal(default, sound(stage, codes(4), params(10, 0.5, seed=1)))


def test_the_three_eighths_rule_is_exact_for_cubics_and_points_sway_towards_the_noise() -> None:
    sampler, sample = RungeKuttaSampler(4), torch.zeros(1, 1, 1)
    for time in sampler.timesteps:
        sample = sampler.step((4 * time**3)[None, None, None], time, sample, return_dict=False)[0]
    assert abs(float(sample) - 1.0) < 1e-6
    spans = time_points(10).diff()
    assert time_points(10)[0] == 0 and abs(float(time_points(10)[-1]) - 1) < 1e-6 and bool((spans.diff() > 0).all())


def test_noise_is_a_frame_s_own() -> None:
    whole = frame_noise(7, 0, 300, MEL)
    for start, count in ((0, 1), (5, 59), (63, 2), (64, 64), (100, 200)):
        assert torch.equal(frame_noise(7, start, count, MEL), whole[start : start + count])
    assert abs(float(whole.mean())) < 0.05 and abs(float(whole.std()) - 1) < 0.05
    assert not torch.equal(whole, frame_noise(8, 0, 300, MEL)) and not torch.equal(whole[:64], whole[64:128])


CROWD = {
    "short": (1, params(3)),
    "block": (3, params(5, 0.0, seed=1)),
    "long": (40, params(2, 1.5, seed=2)),
    "twin": (40, params(2, 1.5, seed=2)),
    "odd": (23, params(4, 0.0, seed=4)),
    "two": (11, params(3, seed=5, num_outputs=2)),
}


@pytest.mark.parametrize("policy, threshold", [("none", None), ("first_block", 0.3)])
def test_a_sound_does_not_depend_on_its_batch_mates(folder: Path, policy: str, threshold: float | None) -> None:
    alone = {}
    for key, (length, value) in CROWD.items():
        stage = engine(folder, pool=POOL, policy=policy, threshold=threshold)
        stage.submit(task(key, codes(length, length), value))
        alone[key] = run(stage).sound(key)
    assert not torch.equal(alone["two"][0], alone["two"][1]), "output i draws from seed + i"
    for order in (list(CROWD), list(CROWD)[::-1]):
        stage = engine(folder, pool=POOL, policy=policy, threshold=threshold)
        for key in order:
            stage.submit(task(key, codes(CROWD[key][0], CROWD[key][0]), CROWD[key][1]))
        ran = run(stage)
        for key in CROWD:
            assert_near(ran.sound(key), alone[key], 1e-5)
        assert stage.get_stats()["running"] == 0 and stage.get_stats()["step_cache_used_bytes"] == 0


def test_a_replay_gives_the_same_bits_and_another_seed_or_speaker_another_sound(folder: Path) -> None:
    stage, rows = engine(folder, pool=POOL), codes(12)
    first = sound(stage, rows, params(seed=3))
    assert torch.equal(first, sound(stage, rows, params(seed=3)))
    assert torch.equal(first, sound(stage, rows, params(seed=3), speaker="Chelsie")), "the default speaker"
    assert not torch.allclose(first, sound(stage, rows, params(seed=4)))
    assert not torch.allclose(first, sound(stage, rows, params(seed=3), speaker="Ethan"))
    unseeded = DiffusionParams(num_inference_steps=3)
    assert not torch.allclose(sound(stage, rows, unseeded), sound(stage, rows, unseeded))


def test_a_step_cache_skips_layers(folder: Path) -> None:
    stage = engine(folder, policy="first_block", threshold=10.0, pool=POOL)
    stage.submit(task("x", codes(12), params(4)))
    event = run(stage).last["x"]
    assert isinstance(event, StageDone) and event.metrics == {"steps": 12, "cache_hits": 11 * 2}


def test_cancel_frees_all_at_any_moment(folder: Path) -> None:
    for num_steps in (0, 1, 5, 8):
        stage = engine(folder, policy="first_block", threshold=0.1, pool=POOL)
        stage.submit(task("x", codes(30), params(3)))
        for _ in range(num_steps):
            stage.step()
        stage.abort("x")
        stage.check_integrity()
        assert stage.activity() is Activity.IDLE and stage.step() == []
        assert stage.get_stats()["running"] == 0 and stage.get_stats()["step_cache_used_bytes"] == 0


@pytest.mark.parametrize(
    "tensor, words",
    [
        ("code2wav_dit_model.transformer_blocks.1.attn.to_v.weight", "latents are not finite"),
        ("code2wav_bigvgan_model.conv_post.weight", "sound is not finite"),
    ],
)
def test_weights_that_are_not_finite_are_a_clear_failure(folder: Path, tmp_path: Path, tensor: str, words: str) -> None:
    for path in folder.iterdir():
        content = path.read_bytes()
        (tmp_path / path.name).write_bytes(content)
    for path in tmp_path.glob("*.safetensors"):
        tensors = load_file(path)
        if f"token2wav.{tensor}" in tensors:
            tensors[f"token2wav.{tensor}"].fill_(float("nan"))
            save_file(tensors, path)
    stage = engine(tmp_path)
    stage.submit(task("x", codes(5), params()))
    event = run(stage).last["x"]
    assert isinstance(event, StageFailed) and isinstance(event.error, StageError) and words in str(event.error)


def test_a_failing_request_harms_no_batch_mate(folder: Path) -> None:
    stage, rows = engine(folder, pool=POOL), codes(14)
    expected = sound(stage, rows, params())
    stage.submit(task("good", rows, params()))
    stage.submit(task("high", torch.tensor([3, 60]), params()))
    stage.submit(task("low", torch.tensor([-1, 3]), params()))
    stage.submit(task("float", torch.zeros(3), params()))
    stage.submit(task("flat", torch.zeros(3, 3, dtype=torch.int64), params()))
    stage.submit(task("none", codes(0), params()))
    stage.submit(task("endless", codes(1025), params()))
    ran = run(stage)
    errors = {key: str(event.error) for key, event in ran.last.items() if isinstance(event, StageFailed)}
    assert errors.keys() == {"high", "low", "float", "flat", "endless"} and ran.sound("none").shape == (1, 1, 0)
    assert "from 3 to 60, expected 0 to 59" in errors["high"] and "from -1 to 3" in errors["low"]
    assert "got 1025, expected at most 1024" in errors["endless"]
    assert_near(ran.sound("good")[0], expected, 1e-5)


def test_nan_in_one_row_stays_there(folder: Path) -> None:
    """Rows lie side by side on the grid, and a layer that looks back would reach into a neighbour's last block."""
    model = engine(folder, pool=POOL).model
    streams = [codes(n, n) for n in (3, 6, 3)]
    chunks = [task("x", rows, params()).inputs["codes"] for rows in streams]
    voice = model.prepare({}, params(), 0, encoded_images())
    with torch.inference_mode():
        trajectories = [model.trajectory(model.prepare_chunk(voice, chunk), params()) for chunk in chunks]
        generators = [torch.Generator().manual_seed(index) for index in range(3)]
        latents = [each.noise(generator) for each, generator in zip(trajectories, generators, strict=True)]
        latents[1][:] = float("nan")
        conditions = [trajectory.conditions["main"] for trajectory in trajectories]
        tokens = model.embed(latents, [0.5] * 3, conditions)
        results = model.unembed(model.run_blocks(tokens, 0, model.num_blocks))
    assert [bool(result.isfinite().all()) for result in results] == [True, False, True]


@pytest.mark.parametrize(
    "bad, field",
    [
        ({"num_inference_steps": 1}, "num_inference_steps"),
        ({"num_inference_steps": 5000}, "num_inference_steps"),
        ({"guidance_scale": 1e6}, "guidance_scale"),
        ({"height": 64}, "height"),
        ({"duration_s": 2.0}, "duration_s"),
        ({"sigmas": [1.0, 0.5]}, "sigmas"),
        ({"negative_prompt": "noise"}, "negative_prompt"),
        ({"extra": {"sway": 1}}, "extra"),
        ({"output_type": "pil"}, "output_type"),
        ({"output_type": "latent"}, "output_type"),
        ({"num_outputs": 1000}, "num_outputs"),
    ],
)
def test_bad_requests_are_refused_with_their_field(folder: Path, bad: dict[str, object], field: str) -> None:
    stage, value = engine(folder, pool=POOL), DiffusionParams(**bad)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match=field):
        stage.spec.check(task("x", codes(3), value).request, value, ReadPorts())


def test_a_requests_own_negative_prompt_is_refused_too(folder: Path) -> None:
    stage = engine(folder, pool=POOL)
    with pytest.raises(InvalidRequestError, match="negative_prompt"):
        stage.spec.check(OmniRequest(prompt="x", negative_prompt="noise"), params(), ReadPorts())


@pytest.mark.parametrize("speaker", ["Chelsi", "../spk_dict", 3, ["Ethan"]])
def test_unknown_speakers_are_refused(folder: Path, speaker: object) -> None:
    stage = engine(folder, pool=POOL)
    assert stage.spec.request_keys == {"speaker"}
    with pytest.raises(InvalidRequestError, match="speaker: got"):
        stage.spec.check(task("x", codes(3), params(), {"speaker": speaker}).request, params(), ReadPorts())
    stage.spec.check(task("x", codes(3), params(), {"speaker": "Ethan"}).request, params(), ReadPorts())


def test_published_weights_fit_with_nothing_missing_or_left_over() -> None:
    """Both published sizes have the same token2wav: transformers' defaults."""
    config = tiny_config(token2wav_config={})
    with torch.device("meta"):
        modules = Token2WavModules(Token2WavConfig.from_dict({}))
        reference = type(tiny_reference().token2wav)(config.token2wav_config)
    shapes = {f"token2wav.{name}": tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    shapes |= {"thinker.model.norm.weight": (3,), "token2wav.code2wav_dit_model.rotary_embed.inv_freq": (32,)}
    assert len(plan_loading(modules, shapes, "here")) == len(shapes) - 2
    dit, vocoder = modules.transformer.config, modules.vocoder
    assert (dit.codes_per_grid, dit.blocks_back, dit.blocks_ahead) == (12, 2, 1)
    assert vocoder.config.hop == 240
    for name in list(shapes)[:5]:
        with pytest.raises(CheckpointError):
            plan_loading(modules, {key: shape for key, shape in shapes.items() if key != name}, "here")
    with pytest.raises(CheckpointError, match="unexpected tensor"):
        plan_loading(modules, {**shapes, "token2wav.code2wav_dit_model.extra": (1,)}, "here")


def test_only_the_part_s_weights_are_planned_for(folder: Path) -> None:
    stage, modules = spec(folder), Token2WavModules(Token2WavConfig.from_folder(folder))
    plan = stage.plan_memory()
    assert plan.weights_bytes == 4 * sum(parameter.numel() for parameter in modules.parameters())
    in_halves = 2 * sum(parameter.numel() for parameter in modules.transformer.layers.parameters())
    assert spec(folder, dtype="bfloat16").plan_memory().weights_bytes == plan.weights_bytes - in_halves
    assert plan.step_cache_bytes == 0


def test_check_shows_the_stage_with_its_ports_and_its_float32(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    register_spell()
    path = tmp_path / "speech.yaml"
    path.write_text(SPEECH_YAML.replace("FOLDER", str(folder)))
    assert main(["check", str(path)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.split("\n")]
    assert "speech float32 (as the reference implementation computes)" in lines
    assert "speech in codes [T] <- talker.codes" in lines
    assert "out audio [N, 1, n] => result" in lines or "speech out audio [N, 1, n] => result" in lines


@pytest.mark.parametrize(
    "part, words",
    [(None, "part: missing.*token2wav"), ("token2wave", "did you mean 'token2wav'"), ("talker", "talker")],
)
def test_the_part_must_be_one_that_diffuses(folder: Path, part: str | None, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        spec(folder, part=part)


def test_voices_of_another_model_are_refused(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for change in (
        {"cond": torch.zeros(1, 13)},
        {"ref_mel": torch.zeros(1, 30, 21)},
        {"ref_mel": torch.zeros(1, 4, 20)},
    ):
        voices = tiny_speakers()
        voices["Ethan"].update(change)
        torch.save(voices, tmp_path / "spk_dict.pt")
        with pytest.raises(CheckpointError, match=r"'Ethan': got cond .* expected \[12\] and \[more than 4, 20\]"):
            engine(tmp_path)


@pytest.mark.parametrize(
    "section, change, words",
    [
        ("dit_config", {"block_size": 0}, r"dit_config: block_size: got 0"),
        ("dit_config", {"enc_channels": [16, 16, 16]}, "equally many"),
        ("dit_config", {"enc_channels": [16, 16, 16, 16, 40]}, "expected the sum"),
        ("dit_config", {"look_ahead_layers": 2}, "expected a list"),
        ("dit_config", {"mel_dim": 40}, "mel_dim"),
        ("dit_config", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type"),
        ("bigvgan_config", {"upsample_kernel_sizes": [11, 7, 3]}, "upsample_kernel_sizes: got 3"),
        ("bigvgan_config", {"upsample_rates": [5, 3]}, "as many"),
        ("bigvgan_config", {"resblock_kernel_sizes": [3, 4, 11]}, "odd"),
        ("bigvgan_config", {"upsample_initial_channel": 4}, "at least 8"),
    ],
)
def test_configs_that_make_no_sense_are_refused(section: str, change: dict[str, object], words: str) -> None:
    Token2WavConfig.from_dict(TOKEN2WAV)
    with pytest.raises(ConfigError, match=words):
        Token2WavConfig.from_dict({**TOKEN2WAV, section: {**TOKEN2WAV[section], **change}})
