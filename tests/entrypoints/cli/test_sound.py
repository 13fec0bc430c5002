"""The command line makes sounds: a random ACE-Step folder, from words and a source on the command line to files."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from support.ace_step import SAMPLE_RATE, random_pipeline
from support.music import sound
from support.programs import run_program

from vllm_omni import DiffusionParams, Omni
from vllm_omni.entrypoints.cli import main

Said = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ace_step")
    random_pipeline(folder)
    return folder


@pytest.fixture
def said(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Said:
    """(exit status, stderr) of `vllm-omni generate` with these arguments, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def generate(*arguments: str) -> tuple[int, str]:
        status = main(command(folder, *arguments))
        return status, capsys.readouterr().err

    return generate


def command(folder: Path, *arguments: str) -> list[str]:
    return ["generate", *arguments, "--model", str(folder), "--steps", "2"]


def test_a_sound_comes_out_as_the_file_that_was_asked_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = ["--input", "duration_s=0.5", "--input", "lyrics=[verse] la", "--seed", "3"]
    monkeypatch.chdir(tmp_path)
    done = run_program("-m", "vllm_omni", *command(folder, "slow bells", "-o", "bells.flac", *inputs))
    assert (done.returncode, done.stderr) == (0, "wrote bells.flac\n")
    with Omni(model=str(folder), progress=False) as omni:
        prompt = {"prompt": "slow bells", "duration_s": 0.5, "lyrics": "[verse] la"}
        (output,) = omni.generate(prompt, {"music": DiffusionParams(seed=3, num_inference_steps=2)})
    samples, rate = soundfile.read(tmp_path / "bells.flac", dtype="float32")
    assert rate == SAMPLE_RATE and np.abs(samples.T - output.audios[0].samples).max() < 2**-22


def test_two_covers_of_a_file_are_numbered_and_named_out(said: Said, tmp_path: Path) -> None:
    sound(0.6, rate=8000).save(tmp_path / "song.ogg")
    cover = ["--input", "task_type=cover", "--input", "audio=song.ogg"]
    status, told = said("slow bells", "fast bells", *cover)
    assert status == 0 and told.endswith("wrote out-0.wav\nwrote out-1.wav\n")
    assert re.match(r"prompt 0: seed (\d+)\nprompt 1: seed (?!\1\n)\d+\nwrote", told), told
    first, second = (soundfile.read(tmp_path / f"out-{index}.wav")[0] for index in range(2))
    assert first.shape == second.shape == (round(0.6 * SAMPLE_RATE) // 32 * 32, 2)
    assert np.abs(first - second).max() > 0.01


def test_what_is_wrong_is_one_line_each(said: Said, tmp_path: Path) -> None:
    status, told = said("slow bells", "-o", "bells.wav", "--input", "task_type=cover")
    assert status == 1 and not (tmp_path / "bells.wav").exists()
    assert told == "error: prompt 0: task_type: 'cover' needs 'audio' or 'audio_codes'; give one of them\n"
    missing = said("slow bells", "--input", "task_type=cover", "--input", "audio=none.wav")[1]
    assert "error: prompt 0: audio: got 'none.wav', which cannot be read (No such file" in missing
