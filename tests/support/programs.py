"""Python programs that tests run to their end, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from vllm_omni.utils.children.fork_client import can_fork

from .forked_program import ForkedProgram

TESTS = Path(__file__).parents[1]


def program_environment() -> dict[str, str]:
    """One for all programs, so that they are forked from one process."""
    # the tests' own threads and the program's share few cores
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    environment.pop("VLLM_OMNI_API_KEY", None)
    # so that a config may import support.X
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    return environment


def run_program(*arguments: str, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
    """`python` with these arguments, which begin with `-m` or `-c`, in this folder; what it wrote and how it ended."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        if can_fork():
            program = ForkedProgram(arguments, program_environment(), output.fileno(), errors.fileno())
            try:
                status = program.wait(timeout_s)
            except subprocess.TimeoutExpired:
                program.kill()
                program.wait()
                raise
        else:
            command = [sys.executable, *arguments]
            done = subprocess.run(
                command, env=program_environment(), stdout=output, stderr=errors, check=False, timeout=timeout_s
            )
            status = done.returncode
        texts = []
        for file in (output, errors):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess(arguments, status, *texts)
