"""What pyproject.toml cannot say: the shipped stage configs are installed as a package of their own, and the CPU
kernels are compiled where there is a compiler. Without one the package works by torch alone.
"""

from __future__ import annotations

import platform
import runpy
import sys
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

# Name of a variant -> the instruction sets that it is compiled for; vllm_omni/layers/native/library.py picks one.
VARIANTS = {
    "amx": ["-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni", "-mamx-tile", "-mamx-bf16", "-mamx-int8"],
    "avx512bf16": ["-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni"],
    "avx2": ["-march=x86-64-v3"],
}
STRUCTURES = "vllm_omni/layers/native/structures.py"
FLAGS = ["-std=c++20", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-g0", "-fopenmp", "-Wall", "-Wextra"]


class BuildKernels(build_ext):
    """Variants of one source, each in a folder of its own. They are loaded by ctypes, and are no Python modules."""

    def build_extension(self, extension: Extension) -> None:
        common = self.build_temp
        self.build_temp = str(Path(common) / extension.name.rpartition(".")[2])
        super().build_extension(extension)
        self.build_temp = common


def kernels() -> list[Extension]:
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return []
    headers = [str(path) for path in sorted(Path("csrc/cpu").glob("*.h"))]
    common = [*FLAGS, f"-DOMNI_INTERFACE={interface()}ULL"]
    return [
        Extension(
            f"vllm_omni.layers.native._{name}",
            ["csrc/cpu/kernels.cpp"],
            depends=[*headers, STRUCTURES],
            extra_compile_args=[*common, *flags],
            extra_link_args=["-fopenmp"],
            optional=True,
        )
        for name, flags in VARIANTS.items()
    ]


def interface() -> int:
    """What the package's side of the calls says of itself; compiled in, so that no other version calls the kernels."""
    number: int = runpy.run_path(STRUCTURES)["interface"]()
    return number


found = find_namespace_packages(include=["vllm_omni*"], exclude=["*.__pycache__*"])
setup(packages=[*found, "vllm_omni.stage_configs"], ext_modules=kernels(), cmdclass={"build_ext": BuildKernels})
