"""Examples run from another folder, in this process or in one of their own; and what they wrote, read."""

from __future__ import annotations

import io
import os
import runpy
import subprocess
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import soundfile
from PIL import Image

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PICTURE = (128, 128)
TIMEOUT_S = 300


def run(name: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """In this process, which has imported already what each example imports; `start` begins a new one."""
    said, complaints = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patched, redirect_stdout(said), redirect_stderr(complaints):
        patched.chdir(folder)
        patched.setattr(sys, "argv", [str(EXAMPLES / name), *arguments])
        status = _exit_status(EXAMPLES / name)
    return subprocess.CompletedProcess([name, *arguments], status, said.getvalue(), complaints.getvalue())


def _exit_status(path: Path) -> int:
    """As Python makes it, with what Python says."""
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def start(name: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """As a user does: in a process of its own."""
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
