"""Examples run as a user runs them, from another folder; and what they wrote, read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import soundfile
from PIL import Image

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PICTURE = (128, 128)
TIMEOUT_S = 300


def run(name: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=TIMEOUT_S,
    )


def succeed(name: str, *arguments: str, folder: Path) -> str:
    done = run(name, *arguments, folder=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def picture(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image


def sound(path: Path) -> tuple[int, int]:
    """(samples, rate)."""
    samples, rate = soundfile.read(path)
    return len(samples), rate
