"""`generate --save-state` and `resume`: a run that is stopped, after some steps or by Ctrl-C, gives the same file."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import struct
import termios
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.forked_program import ForkedProgram
from support.programs import program_environment

from vllm_omni.entrypoints.cli import main

ROOT = Path(__file__).parents[3]
PICTURE = ["generate", "a red circle", "--seed", "3", "--steps", "6", "-q"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def same(left: str, right: str) -> bool:
    with Image.open(left) as first, Image.open(right) as second:
        return np.array_equal(np.asarray(first), np.asarray(second)) and first.info == second.info


def test_a_picture_that_was_stopped_twice_is_the_one_that_was_not() -> None:
    assert main([*PICTURE, "-o", "whole.png"]) == 0
    assert main([*PICTURE, "-o", "x.png", "--save-state", "x.safetensors", "--stop-after-steps", "2"]) == 0
    assert not Path("x.png").exists()
    later = ["--save-state", "y.safetensors", "--stop-after-steps", "5", "-q", "-o", "y.png"]
    assert main(["resume", "x.safetensors", *later]) == 0
    assert not Path("y.png").exists()
    assert main(["resume", "y.safetensors", "-o", "y.png", "-q"]) == 0
    assert same("whole.png", "y.png")


def test_one_that_is_done_before_is_written_as_ever(capsys: pytest.CaptureFixture[str]) -> None:
    stopping = ["--save-state", "x.safetensors", "--stop-after-steps", "60", "--json"]
    assert main([*PICTURE, "-o", "x.png", *stopping]) == 0
    assert Path("x.png").exists() and not Path("x.safetensors").exists()
    (answer,) = json.loads(capsys.readouterr().out)["outputs"]
    assert answer["seed"] == 3


def test_what_was_saved_and_how_to_go_on_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    loud = [word for word in PICTURE if word != "-q"]
    main([*loud, "--save-state", "x.safetensors", "--stop-after-steps", "2"])
    said = capsys.readouterr().err
    assert "saved x.safetensors (image 2/6); go on with: vllm-omni resume x.safetensors" in said


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="this system has no pseudo-terminals")
def test_ctrl_c_leaves_a_state() -> None:
    command = ["-m", "vllm_omni", *PICTURE[:4], "--steps", "300", "--save-state", "x.safetensors"]
    terminal, end = os.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))  # what is shown has a place
    run = ForkedProgram(command, program_environment(), end, end)
    os.close(end)
    said, is_asked = b"", False
    with contextlib.suppress(OSError):  # which says that the other end is closed
        while piece := os.read(terminal, 4096):
            said += piece
            if not is_asked and b"image 3/300" in said:
                os.kill(run.pid, signal.SIGINT)
                is_asked = True
    os.close(terminal)
    assert run.wait(60) == 130 and b"/300); go on with" in said
    assert main(["resume", "x.safetensors", "-o", "x.png", "-q"]) == 0
    assert Path("x.png").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--stop-after-steps", "2"], "--stop-after-steps: give --save-state FILE too"),
        (["--save-state", "x.png"], "expected a name that ends in .safetensors"),
        (["--prompts", "two.txt", "--save-state", "x.safetensors"], "--save-state: got 3 prompts, expected one"),
        (["--save-state", "x.safetensors", "--stop-after-steps", "0"], "--stop-after-steps: got 0"),
    ],
)
def test_options_that_make_no_sense_are_refused_in_words(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("two.txt").write_text("a star\na circle\n")
    assert main([*PICTURE, *arguments]) == 1
    assert words in capsys.readouterr().err


def test_a_config_without_such_a_stage_is_refused_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "hello", "--model", "asset://tiny-speech", "--save-state", "x.safetensors"]) == 1
    assert "expected one with a stage that denoises a picture or a sound as a whole" in capsys.readouterr().err


def test_a_state_of_a_config_that_does_not_ship_wants_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    yaml = (ROOT / "configs/stages/tiny_image.yaml").read_text().replace("name: tiny-image", "name: mine")
    Path("mine.yaml").write_text(yaml)
    stopping = ["--save-state", "x.safetensors", "--stop-after-steps", "2"]
    assert main([*PICTURE, "--config", "mine.yaml", *stopping]) == 0
    assert main(["resume", "x.safetensors"]) == 1
    assert "--config: missing; the state is of the config 'mine', which does not ship" in capsys.readouterr().err
    assert main(["resume", "x.safetensors", "--config", "mine.yaml", "-q", "-o", "x.png"]) == 0


def test_a_file_that_is_no_state_is_refused_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.safetensors").write_bytes(b"no")
    assert main(["resume", "x.safetensors"]) == 1
    assert "x.safetensors: damaged, expected vllm_omni.state" in capsys.readouterr().err
