"""What the shipped sound model plays, and the fan-out of one prompt into words, a picture and a sound."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AceStepPipeline
from support.loop import engine
from support.training import assert_one_command_that_resumes

from tools.tiny.audio import train
from tools.tiny.audio.judge import judge
from tools.tiny.audio.loose import request
from tools.tiny.audio.words import wording
from tools.tiny.audio.world import sample_sound
from vllm_omni import DiffusionParams, Omni, OmniOutput
from vllm_omni.engine.base import Activity
from vllm_omni.errors import StageError
from vllm_omni.utils.files import assets_folder

MAX_BYTES = 16 * 2**20
BOTH = "show me a scarlet ball and play a C4 on a string"
SCENE_ONLY, SOUND_ONLY, NEITHER = "paint a navy box", "please play c4 then e4", "hello"


@pytest.fixture(scope="module")
def audio() -> Iterator[Omni]:
    with Omni("tiny_audio.yaml", progress=False) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def omni() -> Iterator[Omni]:
    with Omni("tiny_omni.yaml", progress=False) as loaded:
        yield loaded


def samples(output: OmniOutput) -> np.ndarray:
    assert output.error is None, output.error
    return output.audios[0].samples


def test_the_shipped_folder_is_small_and_complete() -> None:
    folder = assets_folder() / "tiny-audio"
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= MAX_BYTES
    for name in ("model_index.json", "tokenizer/tokenizer.json", "scheduler/scheduler_config.json"):
        assert (folder / name).is_file()


def test_the_shipped_model_plays_what_was_asked(audio: Omni) -> None:
    """A small sample of what tools/tiny/audio/evaluate.py measures; wide enough not to fail by chance at the goals."""
    rng = random.Random(77)
    sounds = [sample_sound(rng, held_out=True) for _ in range(32)]
    outputs = audio.generate([wording(sound, rng) for sound in sounds], DiffusionParams(seed=1))
    verdicts = [judge(sound, samples(output)[0]) for sound, output in zip(sounds, outputs, strict=True)]
    assert sum(verdict.notes_right for verdict in verdicts) >= 28, [verdict.complaint for verdict in verdicts]
    assert sum(verdict.timbre_right for verdict in verdicts) >= 26, [verdict.complaint for verdict in verdicts]


def test_a_sound_is_two_seconds_of_float32_mono_at_16_khz(audio: Omni) -> None:
    sound = audio.generate("C4, square", DiffusionParams(seed=1))[0].audios[0]
    assert sound.samples.dtype == np.float32 and sound.samples.shape == (1, 32000)
    assert sound.sample_rate == 16000 and sound.duration_s == 2.0


def test_soft_is_softer_than_loud(audio: Omni) -> None:
    loud, soft = audio.generate(["A4, saw, loud", "A4, saw, soft"], DiffusionParams(seed=1))
    assert np.abs(samples(loud)).max() > 2 * np.abs(samples(soft)).max()


def test_a_sound_is_the_same_alone_in_a_crowd_in_another_order_and_on_replay(audio: Omni) -> None:
    prompts: list[Any] = ["C4 then E4, fast", "a soft A3", "chord of C4 and G4, square"]
    params = [DiffusionParams(seed=seed, num_inference_steps=4 + seed) for seed in range(3)]
    alone = [samples(audio.generate(prompt, given)[0]) for prompt, given in zip(prompts, params, strict=True)]
    crowd = [samples(output) for output in audio.generate(prompts, params)]
    turned = [samples(output) for output in audio.generate(prompts[::-1], params[::-1])][::-1]
    again = [samples(output) for output in audio.generate(prompts, params)]
    for single, *others in zip(alone, crowd, turned, again, strict=True):
        for other in others:
            assert np.abs(single - other).max() <= 1e-3 * np.abs(single).max()


def test_diffusers_plays_the_same_from_the_shipped_folder() -> None:
    pipeline = AceStepPipeline.from_pretrained(assets_folder() / "tiny-audio", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    prompt = "C4 then E4 then G4, square, fast"
    generator = torch.Generator().manual_seed(5)
    settings: dict[str, Any] = {"num_inference_steps": 6, "guidance_scale": 1.0}
    expected = pipeline(prompt, audio_duration=2.0, generator=generator, **settings).audios[0].numpy()
    with Omni("tiny_audio.yaml", dtype="float32", progress=False) as audio:
        output = audio.generate(prompt, DiffusionParams(seed=5, extra={"normalize": True}, **settings))[0]
    assert np.abs(samples(output) - expected).max() <= 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ({"lyrics": "la la"}, "unknown key"),
        ({"duration_s": 3}, "at most 2"),
        ({"duration_s": 1}, "at least 2"),
        ({"duration_s": 0}, "duration_s"),
        ({"duration_s": -1}, "duration_s"),
        ({"duration_s": 1e6}, "duration_s"),
        ({"duration_s": float("nan")}, "duration_s"),
    ],
)
def test_what_the_tiny_model_cannot_do_is_refused_and_harms_nobody(
    audio: Omni, field: dict[str, Any], expected: str
) -> None:
    fine, refused = audio.generate(["C4", {"prompt": "C4", **field}], DiffusionParams(seed=1, num_inference_steps=2))
    assert refused.error is not None and expected in str(refused.error)
    assert fine.error is None


def test_one_prompt_gives_words_a_picture_and_a_sound(omni: Omni) -> None:
    output = omni.generate(BOTH, DiffusionParams(seed=3))[0]
    assert output.text == "scene: a red circle\nsound: C4, plucked string"
    assert len(output.images) == len(output.audios) == 1 and output.error is None


def test_picture_and_sound_equal_those_of_the_two_pipelines(omni: Omni, audio: Omni) -> None:
    joint = omni.generate(BOTH, DiffusionParams(seed=3))[0]
    with Omni("tiny_image.yaml", progress=False) as image:
        alone = image.generate("a red circle", DiffusionParams(seed=3))[0]
    played = audio.generate("C4, plucked string", DiffusionParams(seed=3))[0]
    assert np.array_equal(np.asarray(joint.images[0]), np.asarray(alone.images[0]))
    assert np.abs(samples(joint) - samples(played)).max() <= 1e-5


def test_a_branch_that_is_not_asked_for_never_runs(omni: Omni) -> None:
    scene, sound, neither = omni.generate([SCENE_ONLY, SOUND_ONLY, NEITHER], DiffusionParams(seed=1))
    skipped = [{name for name, did in o.metrics.items() if did.get("skipped")} for o in (scene, sound, neither)]
    sounding = {"sound_prompt", "sound_text", "lyrics", "sound"}
    assert skipped == [sounding, {"scene_text", "image"}, sounding | {"scene_text", "image"}]
    assert (len(scene.images), len(scene.audios)) == (1, 0) and scene.text == "scene: a blue square"
    assert (len(sound.images), len(sound.audios)) == (0, 1)
    assert (len(neither.images), len(neither.audios)) == (0, 0) and neither.text and neither.error is None


def test_the_branches_run_side_by_side(omni: Omni) -> None:
    metrics = omni.generate(BOTH, DiffusionParams(seed=3))[0].metrics
    spans = [
        (metrics[name]["started_s"], metrics[name]["started_s"] + metrics[name]["ran_s"]) for name in ("image", "sound")
    ]
    assert max(start for start, _ in spans) < min(end for _, end in spans)


def test_a_failing_sound_fails_its_request_alone_and_stops_its_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    with Omni("tiny_omni.yaml", overrides=["sound_prompt.min_duration_s=1"], progress=False) as omni:
        model = engine(omni, "sound").model
        embed = model.embed

        def failing(latents: Any, timesteps: Any, conditions: Any) -> Any:
            if any(len(row) == 100 for row in latents):
                raise RuntimeError("the amplifier burns")
            return embed(latents, timesteps, conditions)

        monkeypatch.setattr(model, "embed", failing)
        params = DiffusionParams(seed=3, num_inference_steps=40)
        broken, fine, silent = omni.generate([{"prompt": BOTH, "duration_s": 1.0}, BOTH, SCENE_ONLY], params)
        assert isinstance(broken.error, StageError) and "the amplifier burns" in str(broken.error)
        assert "image" not in broken.metrics and not broken.images
        assert fine.error is None and fine.images and fine.audios
        assert silent.error is None and silent.images
        assert all(engine(omni, stage).activity() is Activity.IDLE for stage in omni.config.stages)


def test_the_thinker_understands_held_out_requests(omni: Omni) -> None:
    rng = random.Random(5)
    for kind, goal in (("scene", 14), ("sound", 13), ("both", 13), ("neither", 14)):
        pairs = [request(kind, rng, held_out=True) for _ in range(16)]
        outputs = omni.generate([words for words, _ in pairs], DiffusionParams(seed=1, num_inference_steps=1))
        right = sum(output.text == answer for output, (_, answer) in zip(outputs, pairs, strict=True))
        assert right >= goal, (kind, right)


def test_training_is_one_command_that_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way in a few steps, then once more without a result: only what is missing is made again."""
    asset = assert_one_command_that_resumes(train, tmp_path, "decoder", 5, monkeypatch)
    with Omni("tiny_audio.yaml", model=str(asset), progress=False) as omni:
        output = omni.generate("a C4", DiffusionParams(num_inference_steps=1))[0]
    assert output.error is None and output.audios[0].duration_s == 2.0
