"""Words to music through the shipped ACE-Step configs, against diffusers' AceStepPipeline given the same words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AceStepPipeline
from support.ace_step import SAMPLE_RATE, random_pipeline, sound
from support.ar import make_model_folder, make_tokenizer
from tokenizers import AddedToken
from torch import Tensor

from vllm_omni import DiffusionParams, Omni, OmniOutput, SamplingParams
from vllm_omni.errors import InvalidRequestError

CODES = [f"<|audio_code_{number}|>" for number in range(0, 4000, 100)]


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> tuple[AceStepPipeline, Path]:
    folder = tmp_path_factory.mktemp("ace_step")
    return random_pipeline(folder), folder


def given(audio: Tensor) -> dict[str, Any]:
    """A sound as a caller gives it."""
    return {"array": audio.numpy(), "sampling_rate": SAMPLE_RATE}


def assert_equal(output: OmniOutput, expected: Tensor) -> None:
    assert output.error is None, output.error
    (audio,) = output.audios
    assert audio.sample_rate == SAMPLE_RATE and audio.samples.shape == expected.shape
    assert abs(audio.samples - expected.numpy()).max() < 1e-3 * float(expected.abs().max())


def test_three_durations_a_cover_and_a_repainting_in_one_call_equal_the_reference(
    guided: tuple[AceStepPipeline, Path],
) -> None:
    pipeline, folder = guided
    source, reference = sound(1.4, 5), sound(3.0, 6)
    words = {"lyrics": "[verse]\nover the sea", "bpm": 84, "keyscale": "A minor", "timesignature": "3"}
    window = {"task_type": "repaint", "repainting_start": 0.3, "repainting_end": 0.9}
    cover = {"task_type": "cover", "audio_cover_strength": 0.5, "vocal_language": "de"}
    calls: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"duration_s": 1.0}, {"audio_duration": 1.0}),
        ({"duration_s": 2.04, **words}, {"audio_duration": 2.04, **words}),
        ({"duration_s": 0.6, "instruction": "Play"}, {"audio_duration": 0.6, "instruction": "Play"}),
        ({"audio": given(source), **window}, {"audio_duration": 1.4, "src_audio": source, **window}),
        (
            {"audio": given(source), "reference_audio": given(reference), **cover},
            {"audio_duration": 1.4, "src_audio": source, "reference_audio": reference, **cover},
        ),
    ]
    prompts = [{"prompt": "slow bells", **ours} for ours, _ in calls]
    params = [DiffusionParams(seed=seed, num_inference_steps=2) for seed in range(len(calls))]
    with Omni("ace_step", model=str(folder), device="cpu", dtype="float32", progress=False) as omni:
        outputs = omni.generate(prompts, params)
    for seed, ((_, theirs), output) in enumerate(zip(calls, outputs, strict=True)):
        torch.manual_seed(seed + 1)
        generator = torch.Generator().manual_seed(seed)
        expected = pipeline(prompt="slow bells", num_inference_steps=2, generator=generator, **theirs).audios[0]
        assert_equal(output, expected)


def test_the_duration_may_stand_in_the_parameters_and_limits_hold(guided: tuple[AceStepPipeline, Path]) -> None:
    _, folder = guided
    overrides = ["limits.max_duration_s=2", "music.defaults={num_inference_steps: 1}"]
    with Omni("ace_step", model=str(folder), overrides=overrides, dtype="float32", progress=False) as omni:
        outputs = omni.generate(["slow bells"] * 2, [DiffusionParams(duration_s=0.4), DiffusionParams(duration_s=2.4)])
        assert outputs[0].audios[0].duration_s == 0.4
        assert isinstance(outputs[1].error, InvalidRequestError) and "duration_s: got 2.4" in str(outputs[1].error)


def test_a_planner_writes_codes_and_the_music_follows_them(
    guided: tuple[AceStepPipeline, Path], tmp_path: Path
) -> None:
    pipeline, folder = guided
    make_model_folder(tmp_path, vocab_size=400, max_position_embeddings=2048)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken(code, special=True) for code in CODES])
    tokenizer.save_pretrained(tmp_path)
    bias = dict.fromkeys(tokenizer.convert_tokens_to_ids(CODES), 100.0)
    overrides = [f"planner.model={tmp_path}", "planner.max_model_len=2048", "outputs=[music, planner]"]
    planning = SamplingParams(logit_bias=bias, max_tokens=4, temperature=0.0, ignore_eos=True)
    making = DiffusionParams(seed=3, num_inference_steps=2)
    with Omni("ace_step_planner", model=str(folder), overrides=overrides, dtype="float32", progress=False) as omni:
        (output,) = omni.generate({"prompt": "slow bells", "duration_s": 1.0}, {"planner": planning, "music": making})
    assert output.error is None, output.error
    assert output.text is not None and output.text.count("<|audio_code_") == 4
    generator = torch.Generator().manual_seed(3)
    facts = {"audio_duration": 1.0, "num_inference_steps": 2, "audio_codes": output.text}
    assert_equal(output, pipeline(prompt="slow bells", generator=generator, **facts).audios[0])
