"""The benchmark of decoding runs, both of its sides make the same sound, and its picture is drawn."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from PIL import Image

from benchmarks.decode_memory import PICTURE, Found, draw

ROOT = Path(__file__).resolve().parents[3]


def test_decoding_whole_and_in_chunks_is_one_sound_and_a_quick_look_draws_nothing(tmp_path: Path) -> None:
    before = PICTURE.read_bytes() if PICTURE.is_file() else None
    command = [sys.executable, "benchmarks/run.py", "decode_memory", "--quick", "--threads", "1"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "found.json")], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    cases = json.loads((tmp_path / "found.json").read_text())["decode_memory"]["figures"]["cases"]
    (case,) = cases
    whole, chunked = case["memory_mb"]
    assert case["duration_s"] == 20 and case["difference"] < 1e-4 and 0 < 2 * chunked < whole
    assert before == (PICTURE.read_bytes() if PICTURE.is_file() else None)


def test_the_picture_is_a_png_with_both_lines(tmp_path: Path) -> None:
    file = tmp_path / "new" / "memory.png"
    draw([Found(s, (10.0 * s, 30.0), (1.0, 1.1), 1e-6) for s in (10, 60, 240)], file)
    with Image.open(file) as picture:
        assert picture.format == "PNG"
        colours = {colour for _, colour in picture.convert("RGB").getcolors(maxcolors=100_000) or []}
    assert {(31, 119, 180), (255, 127, 14)} <= colours
