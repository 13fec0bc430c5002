"""The stage kind `music_prompt`: texts equal to diffusers', and what is decided of a request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AceStepPipeline
from diffusers.pipelines.ace_step.pipeline_ace_step import TASK_INSTRUCTIONS
from support.music import EVERYTHING, HOP, POOL, RATE, TEXTS, Prompter, codes, save_folder, sound

from vllm_omni import DiffusionParams
from vllm_omni.errors import InvalidRequestError
from vllm_omni.models.ace_step.prompt.options import REQUEST_KEYS
from vllm_omni.models.ace_step.request import MusicOutline
from vllm_omni.payload import DataSpec, TensorSpec, TextSpec


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"lyrics": "[verse]\nla {la}\n", "vocal_language": "ja"},
        {"bpm": 120, "keyscale": "F# minor", "timesignature": "3", "duration_s": 12.9},
        {"bpm": 30, "duration_s": 0.4},
        {"keyscale": "B♭ major", "timesignature": "6"},
        {"instruction": "Sing it"},
        {"instruction": "Sing it:", "duration_s": 599},
    ],
)
def test_texts_are_those_of_diffusers(prompter: Prompter, fields: dict[str, Any]) -> None:
    facts = {key: value for key, value in fields.items() if key != "duration_s"}
    formatted = AceStepPipeline._format_prompt(
        AceStepPipeline, "calm piano", audio_duration=fields.get("duration_s", 60.0), **facts
    )
    meta = prompter.payload(**fields).meta
    assert (meta["caption"], meta["lyrics"]) == formatted
    facts.pop("instruction", None)
    plain = AceStepPipeline._format_prompt(
        AceStepPipeline, "calm piano", audio_duration=fields.get("duration_s", 60.0), **facts
    )
    assert (meta["plain_caption"], meta["lyrics"]) == plain


@pytest.mark.parametrize(
    ("fields", "task"),
    [
        ({}, "text2music"),
        ({"task_type": "cover", "audio": sound()}, "cover"),
        ({"task_type": "repaint", "audio": sound()}, "repaint"),
        ({"audio_codes": codes(3)}, "cover"),
    ],
)
def test_the_instruction_is_the_tasks_own(prompter: Prompter, fields: dict[str, Any], task: str) -> None:
    meta = prompter.payload(**fields).meta
    assert f"# Instruction\n{TASK_INSTRUCTIONS[task]}\n" in meta["caption"]
    assert f"# Instruction\n{TASK_INSTRUCTIONS['text2music']}\n" in meta["plain_caption"]
    assert meta["music"]["task_type"] == task


def test_the_planner_reads_a_chat_with_the_known_facts_as_its_thoughts(folder: Path) -> None:
    prompter = Prompter(folder, TEXTS | {"planner_prompt"})
    payload = prompter.payload(lyrics="la la", bpm=90, keyscale="c major", timesignature=4, duration_s=15.5)
    assert payload.meta["planner_prompt"] == (
        "<|im_start|>system\n# Instruction\nGenerate audio semantic tokens based on the given conditions:\n\n"
        "<|im_end|>\n"
        "<|im_start|>user\n# Caption\ncalm piano\n\n# Lyric\nla la\n<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nbpm: 90\nduration: 15\nkeyscale: C major\ntimesignature: 4\n</think>\n\n"
        "<|im_end|>\n"
    )
    assert "<think>\nduration: 60\n</think>" in prompter.payload().meta["planner_prompt"]


def test_where_a_planner_writes_codes_the_music_is_a_cover_of_them(folder: Path) -> None:
    music = Prompter(folder, TEXTS | {"planner_prompt"}).music()
    assert (music["task_type"], music["has_audio_codes"]) == ("cover", True)
    for task in ("cover", "repaint"):
        with pytest.raises(InvalidRequestError, match="a language model plans the sounds of this config"):
            Prompter(folder, EVERYTHING | {"planner_prompt"}).check(task_type=task, audio=sound())


def test_music_says_what_is_asked(prompter: Prompter) -> None:
    assert prompter.music() == {
        "task_type": "text2music",
        "duration_s": 60.0,
        "num_frames": 60 * RATE // HOP,
        "repaint_frames": None,
        "cover_strength": 1.0,
        "has_source_audio": False,
        "has_reference_audio": False,
        "has_audio_codes": False,
    }
    repaint = prompter.music(task_type="repaint", audio=sound(), repainting_start=0.5, repainting_end=1)
    assert (repaint["repaint_frames"], repaint["has_source_audio"]) == ([12, 25], True)
    assert prompter.music(task_type="repaint", audio=sound())["repaint_frames"] == [0, None]
    cover = prompter.music(task_type="cover", audio=sound(), audio_cover_strength=0.25, reference_audio=sound(0.3))
    assert (cover["cover_strength"], cover["has_reference_audio"]) == (0.25, True)
    for value in (repaint, cover):
        assert json.loads(json.dumps(value)) == value == MusicOutline.from_json(value).to_json()
    assert prompter.payload(audio_codes=codes(2)).meta["audio_codes"] == codes(2)
    assert prompter.payload().meta["audio_codes"] == ""


def test_sounds_come_at_the_models_rate_and_channels(prompter: Prompter) -> None:
    mono = sound(rate=8000, channels=1)
    tensors = prompter.payload(task_type="cover", audio=sound(), reference_audio=mono).tensors
    assert np.array_equal(tensors["source_audio"].numpy(), sound().samples)
    assert tensors["reference_audio"].dtype == torch.float32 and tensors["reference_audio"].shape == (2, 2 * RATE)
    assert np.abs(tensors["reference_audio"].numpy() - sound(channels=1).samples)[:, 500:-500].max() < 1e-3
    assert not prompter.payload().tensors


@pytest.mark.parametrize(
    ("params", "fields", "expected"),
    [
        (None, {}, 7.0),
        (None, {"duration_s": 3}, 3.0),
        (3.5, {}, 3.5),
        (3.5, {"duration_s": 3.5}, 3.5),
        (None, {"task_type": "cover", "audio": sound(2.5)}, 2.5),
        (2.5, {"task_type": "cover", "audio": sound(2.5)}, 2.5),
        (None, {"audio_codes": codes(10)}, 10 * POOL * HOP / RATE),
        (None, {"audio_codes": codes(10), "duration_s": 1.5}, 1.5),  # within one code
        (None, {"reference_audio": sound(2.5)}, 7.0),
    ],
)
def test_the_duration_is_as_given_else_that_of_the_source_else_the_default(
    folder: Path, params: float | None, fields: dict[str, Any], expected: float
) -> None:
    prompter = Prompter(folder, default_duration_s=7.0)
    assert prompter.music(DiffusionParams(duration_s=params), **fields)["duration_s"] == expected


def test_codes_are_five_frames_each_where_the_folder_does_not_say(tmp_path: Path) -> None:
    prompter = Prompter(save_folder(tmp_path, pool=None))
    assert prompter.music(audio_codes=codes(10))["duration_s"] == 10 * 5 * HOP / RATE


def test_the_ports_are_known_from_the_folder(folder: Path) -> None:
    signature = Prompter(folder).spec.signature
    texts = ("caption", "lyrics", "plain_caption", "planner_prompt", "audio_codes")
    assert {signature.outputs[port] for port in texts} == {TextSpec()}
    assert signature.outputs["music"] == DataSpec("music")
    assert signature.outputs["source_audio"] == signature.outputs["reference_audio"] == TensorSpec((2, "n"))


def test_the_request_keys_are_those_that_the_options_name(folder: Path) -> None:
    assert Prompter(folder).spec.request_keys == REQUEST_KEYS
    assert Prompter(folder, fields=["lyrics"]).spec.request_keys == {"lyrics"}
