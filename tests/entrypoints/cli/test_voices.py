"""`vllm-omni voices`: added with consent alone, listed, removed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
from support.qwen3_tts import sound

from vllm_omni.entrypoints.cli.app import main


def test_a_voice_is_added_listed_and_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soundfile.write(tmp_path / "anna.flac", sound(1.5), 24000)
    folder = ["--folder", str(tmp_path / "voices")]
    add = ["voices", "add", "anna", str(tmp_path / "anna.flac"), *folder]
    with pytest.raises(SystemExit):
        main(add)
    assert "--consent" in capsys.readouterr().err
    assert main([*add, "--consent", "Anna, by letter", "--text", "Good morning."]) == 0
    assert capsys.readouterr().out == "anna: 1.5 s kept\n"
    assert main([*add, "--consent", "again"]) == 1
    assert "name: got 'anna', which is taken" in capsys.readouterr().err

    assert main(["voices", "list", *folder]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert line.split()[:2] == ["anna", "1.5"] and line.endswith("Anna, by letter  Good morning.")
    assert main(["voices", "list", "--json", *folder]) == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert (listed["name"], listed["consent"], listed["duration_s"]) == ("anna", "Anna, by letter", 1.5)

    assert main(["voices", "remove", "anna", *folder]) == 0
    assert capsys.readouterr().out == "anna: removed\n"
    assert main(["voices", "list", *folder]) == 0
    assert capsys.readouterr().out == "no voices\n"
    assert main(["voices", "remove", "anna", *folder]) == 1


def test_a_damaged_file_is_named_beside_the_list(tmp_path: Path) -> None:
    """As a user sees it: in a process of its own."""
    (tmp_path / "bert.safetensors").write_bytes(b"no voice")
    command = [sys.executable, "-m", "vllm_omni", "voices", "list", "--folder", str(tmp_path)]
    listed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (listed.returncode, listed.stdout) == (0, "no voices\n")
    assert "bert.safetensors" in listed.stderr and "remove the file" in listed.stderr
