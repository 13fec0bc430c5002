"""Whatever does not fit in a request, an option or a folder is refused before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.music import EVERYTHING, RATE, Prompter, codes, save_folder, sound

from vllm_omni import DiffusionParams
from vllm_omni.config.schema import LimitsConfig, OmniConfig, StageConfig
from vllm_omni.errors import CheckpointError, ConfigError, InvalidRequestError
from vllm_omni.models.ace_step.prompt.options import MusicPromptOptions
from vllm_omni.models.ace_step.prompt.spec import MusicPromptSpec
from vllm_omni.utils.files import ModelFolders


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": [1, 2]}, "prompt: got tokens or messages, expected a string"),
        ({"lyrics": 7}, "lyrics: got int, expected a string"),
        ({"lyrics": "x" * 501}, r"lyrics: got 501 characters, expected at most 500 \(limits.max_prompt_chars\)"),
        ({"prompt": "x" * 501}, "prompt: got 501 characters"),
        ({"instruction": ""}, "instruction: got '', expected words"),
        ({"instruction": ["x"]}, "instruction: got list"),
        ({"bpm": 29}, r"bpm: got 29, expected at least 30 and at most 300 \(beats per minute\)"),
        ({"bpm": 301}, "bpm: got 301"),
        ({"bpm": 99.5}, "bpm: got 99.5, expected an integer"),
        ({"bpm": "120"}, "bpm: got '120', expected an integer"),
        ({"keyscale": "H major"}, "keyscale: got 'H major', expected a note A to G"),
        ({"keyscale": "C"}, "keyscale: got 'C'"),
        ({"keyscale": 3}, "keyscale: got 3"),
        ({"timesignature": 5}, "timesignature: got 5, expected '2', '3', '4' or '6', the beats of a bar"),
        ({"timesignature": "4/4"}, "timesignature: got '4/4'"),
        ({"timesignature": True}, "timesignature: got True"),
        ({"timesignature": 10**5000}, "timesignature: got a int too long"),
        ({"vocal_language": "xx"}, "vocal_language: got 'xx', expected one of ar, az"),
        ({"vocal_language": ","}, "vocal_language: got ','"),
        ({"task_type": "lego"}, "task_type: got 'lego', which is not supported; expected 'text2music', 'cover' or"),
        ({"task_type": "covr"}, r"task_type: got 'covr', .*\(did you mean 'cover'\?\)"),
        ({"task_type": ["cover"]}, r"task_type: got \['cover'\]"),
        ({"duration_s": 0}, r"duration_s: got 0, expected more than 0 \(seconds\)"),
        ({"duration_s": -1}, "duration_s: got -1"),
        ({"duration_s": float("nan")}, "duration_s: got nan"),
        ({"duration_s": "10"}, "duration_s: got '10', expected a finite number"),
        ({"duration_s": 90.5}, r"duration_s: got 90.5, expected at most 90 \(limits.max_duration_s\)"),
        ({"task_type": "repaint"}, "'repaint' needs the sound to be changed; give it as 'audio'"),
        ({"task_type": "cover"}, "'cover' needs 'audio' or 'audio_codes'"),
        ({"audio": sound()}, "audio: task_type 'text2music' reads none"),
        ({"task_type": "cover", "audio": sound(), "audio_codes": codes(1)}, "audio_codes: got them beside audio"),
        ({"task_type": "cover", "audio": "nowhere.wav"}, "audio: got 'nowhere.wav', which cannot be read"),
        ({"reference_audio": b"x"}, "reference_audio: got a file that is no sound"),
        ({"reference_audio": sound(channels=9)}, "reference_audio: got 9 channels, expected"),
        ({"task_type": "cover", "audio": sound(0.03)}, "audio: got 0.030000 s, expected at least 0.040000 s, one"),
        ({"task_type": "cover", "audio": sound(), "duration_s": 3}, "got 3, but the source lasts 2.00 s"),
        ({"audio_codes": codes(10), "duration_s": 2}, "got 2, but the codes last 1.60 s"),
        ({"audio_codes": "<|audio_code_1|> la"}, "audio_codes: got '<|audio_code_1|> la', expected codes alone"),
        ({"audio_codes": ""}, "audio_codes: got '', expected codes alone"),
        ({"audio_codes": "<|audio_code_99999999999|>"}, "expected codes alone"),
        ({"repainting_start": 1}, "repainting_start: read by task_type 'repaint' alone, got 'text2music'"),
        ({"audio_cover_strength": 0.5}, "audio_cover_strength: read by covers alone, got task_type 'text2music'"),
        ({"audio_codes": codes(3), "audio_cover_strength": 1.5}, "audio_cover_strength: got 1.5, expected at least 0"),
    ],
    ids=lambda value: str(value)[:40].encode("ascii", "replace").decode() if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused(folder: Path, fields: dict[str, Any], words: str) -> None:
    prompter = Prompter(folder, limits=LimitsConfig(max_prompt_chars=500, max_duration_s=90))
    with pytest.raises(InvalidRequestError, match=words.replace("|", r"\|")):
        prompter.check(**fields)


@pytest.mark.parametrize(
    ("start", "end", "words"),
    [
        (1.5, 1.0, "repainting_start: got 1.5, expected less than repainting_end, 1"),
        (None, 0, "repainting_start: got 0, expected less than repainting_end, 0"),
        (2.0, None, "repainting_start: got 2, expected less than the end of the sound, 2"),
        (0, 2.5, "repainting_end: got 2.5, expected at least 0 and at most 2.04, the length of the sound"),
        (-1, None, "repainting_start: got -1"),
        ("0", None, "repainting_start: got '0', expected a finite number"),
    ],
)
def test_a_window_lies_within_the_sound(prompter: Prompter, start: Any, end: Any, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        prompter.check(task_type="repaint", audio=sound(), repainting_start=start, repainting_end=end)


def test_the_duration_is_given_once(prompter: Prompter) -> None:
    with pytest.raises(InvalidRequestError, match="got 3 in the prompt and 4 in the parameters; give one"):
        prompter.check(DiffusionParams(duration_s=4), duration_s=3)


def test_a_stage_may_allow_less_than_the_limits(folder: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"got 3, expected at most 2 \(the stage's max_duration_s\)"):
        Prompter(folder, default_duration_s=1.0, max_duration_s=2.0).check(duration_s=3)


@pytest.mark.parametrize(
    ("port", "fields"),
    [
        ("source_audio", {"task_type": "cover", "audio": sound()}),
        ("reference_audio", {"reference_audio": sound()}),
        ("audio_codes", {"audio_codes": codes(1)}),
    ],
)
def test_a_sound_that_no_stage_reads_is_refused(folder: Path, port: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=rf"no stage of this config reads it \(the port '{port}'\)"):
        Prompter(folder, EVERYTHING - {port}).check(**fields)


@pytest.mark.parametrize(
    ("given", "expected"),
    [("c MAJOR", "C major"), (" F#  Minor ", "F# minor"), ("bb minor", "Bb minor"), ("E♭ major", "E♭ major")],
)
def test_keys_are_written_as_the_model_knows_them(prompter: Prompter, given: str, expected: str) -> None:
    assert f"- keyscale: {expected}\n" in prompter.payload(keyscale=given).meta["caption"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"default_duration_s": 0}, "default_duration_s: got 0, expected more than 0"),
        ({"max_duration_s": 2.0}, r"default_duration_s: got 60, expected at most max_duration_s \(2\)"),
        ({"min_duration_s": 90.0}, r"default_duration_s: got 60, expected at least min_duration_s \(90\)"),
        ({"fields": ["lyrics", "tempo"]}, r"fields: got 'tempo' \(known: "),
        ({"fields": ["lyric"]}, r"fields: got 'lyric' \(did you mean 'lyrics'\?\)"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        MusicPromptOptions(**options)


def spec_of(folder: Path | None, **section: Any) -> MusicPromptSpec:
    stage = StageConfig("prompt", "music_prompt", None if folder is None else str(folder), **section)
    return MusicPromptSpec(stage, OmniConfig(), ModelFolders())


def test_wrong_folders_and_defaults_are_named(tmp_path: Path) -> None:
    folder = save_folder(tmp_path)
    with pytest.raises(
        ConfigError, match=r"defaults: got duration_s, but this stage takes none; set default_duration_s"
    ):
        spec_of(folder, defaults={"duration_s": 3.0})
    (folder / "vae" / "config.json").write_text(json.dumps({"sampling_rate": RATE, "audio_channels": 2}))
    with pytest.raises(ConfigError, match="downsampling_ratios: got None, expected a list"):
        spec_of(folder)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "ZImagePipeline"}))
    with pytest.raises(ConfigError, match="got a folder of 'ZImagePipeline', expected one of 'AceStepPipeline'"):
        spec_of(folder)
    (folder / "model_index.json").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        spec_of(folder)
    with pytest.raises(ConfigError, match="model: missing; expected the folder of an AceStepPipeline"):
        spec_of(None)
