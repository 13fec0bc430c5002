"""Each test of this folder runs with every variant of the kernels alone, that for tiles as loops in place of tiles."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from vllm_omni.layers.native import library
from vllm_omni.layers.native.structures import interface

VARIANTS = library.built_variants()
COMPILER = shutil.which("g++")
EMULATED = "amx, emulated"  # its loops, with tiles that are arrays


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels for tiles, compiled for a processor without: once, by the first of the processes that share tests."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    file = folder / "emulated.so"
    with (folder / "emulated.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            compile_emulated(file)
    return file


def compile_emulated(file: Path) -> None:
    flags = ["-std=c++20", "-O2", "-march=x86-64-v3", "-fopenmp", "-shared", "-fPIC", "-DOMNI_EMULATE_TILES"]
    flags.append(f"-DOMNI_INTERFACE={interface()}ULL")
    source = Path(__file__).parents[3] / "csrc" / "cpu" / "kernels.cpp"
    assert COMPILER is not None
    subprocess.run([COMPILER, *flags, str(source), "-o", str(file)], check=True, timeout=120)


@pytest.fixture(params=[*sorted(VARIANTS), *([EMULATED] if COMPILER else [])], autouse=True)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Only this one is there."""
    if not VARIANTS:
        pytest.skip("no kernels are built for this processor")
    name: str = request.param
    found = {name: request.getfixturevalue("emulated") if name == EMULATED else VARIANTS[name]}
    monkeypatch.setattr(library, "built_variants", lambda: found)
    return name
