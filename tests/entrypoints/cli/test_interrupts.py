"""Ctrl-C ends the command line with exit code 130, quietly, whatever it is in the middle of."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Interrupts its own process when a module begins to be imported, and swallows what Python raises then, as some do.
AT_IMPORT = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ.get("INTERRUPT_AT"):
            try:
                os.kill(os.getpid(), signal.SIGINT)
                for _ in range(1000): pass
            except BaseException:
                raise ImportError("a library that takes an interrupt for a missing module")
sys.meta_path.insert(0, Finder())
"""
EARLY_AND_LATE = (
    "argparse",
    "vllm_omni.entrypoints.cli.generate",
    "omegaconf",
    "torch",
    "torch.nn",
    "transformers",
    "diffusers",
    "vllm_omni.worker.ar.model_runner",
)


def command(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "vllm_omni", "generate", "a red circle", "-o", str(folder / "x.png"), *arguments]


@pytest.mark.parametrize("module", EARLY_AND_LATE)
def test_an_interrupt_while_a_module_is_imported_ends_the_process(module: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(AT_IMPORT)
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command(tmp_path),
        env={**os.environ, "PYTHONPATH": paths, "INTERRUPT_AT": module},
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")
    assert not (tmp_path / "x.png").exists()


def test_an_interrupt_in_the_middle_of_the_work_ends_the_process(tmp_path: Path) -> None:
    many = ["--steps", "1000", "--width", "256", "--height", "256", "--metrics"]
    with subprocess.Popen(command(tmp_path, *many), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        time.sleep(4)
        assert run.poll() is None, run.communicate()
        run.send_signal(signal.SIGINT)
        started = time.monotonic()
        out, complaints = run.communicate(timeout=60)
    assert (run.returncode, out, complaints) == (130, b"", b"") and time.monotonic() - started < 5


def test_a_process_that_ignores_interrupts_goes_on_ignoring_them(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from vllm_omni.__main__ import run\n"
        "sys.argv = ['vllm-omni', 'models']\n"
        "code = run()\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False, timeout=60)
    assert done.returncode == 0 and b"Shipped configs" in done.stdout


def test_files_that_are_being_written_can_be_tidied_up() -> None:
    script = (
        "import os, signal\n"
        "from vllm_omni.entrypoints.cli.interrupts import exit_on_interrupt, interrupts_raise\n"
        "exit_on_interrupt()\n"
        "try:\n"
        "    with interrupts_raise():\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "except KeyboardInterrupt:\n"
        "    print('tidied', flush=True)\n"
        "os.kill(os.getpid(), signal.SIGINT)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"tidied\n", b"")
