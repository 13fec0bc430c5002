"""OpenVINO GenAI as a peer: run by the Python of its own environment. Its continuous batching, with the model as
optimum-intel converts it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from openvino_genai import ContinuousBatchingPipeline, GenerationConfig, SchedulerConfig

from benchmarks.peers.protocol import serve

MAX_SEQUENCES = 32
MAX_BATCHED_TOKENS = 4096  # all prompts of a case in one step
CACHE_GB = 2
PRECISIONS = {"bfloat16": "bf16", "float32": "f32"}


class OpenVinoGenAI:
    def __init__(self, folder: str, dtype: str, threads: int) -> None:
        scheduler = SchedulerConfig()
        scheduler.max_num_seqs = MAX_SEQUENCES
        scheduler.max_num_batched_tokens = MAX_BATCHED_TOKENS
        scheduler.cache_size = CACHE_GB
        scheduler.enable_prefix_caching = False  # every prompt is new
        properties = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": PRECISIONS[dtype],
            "KV_CACHE_PRECISION": PRECISIONS[dtype],
            "PERFORMANCE_HINT": "LATENCY",  # one stream that has all threads
        }
        self._pipeline = ContinuousBatchingPipeline(str(_converted(Path(folder))), scheduler, "CPU", properties)

    def write(self, prompts: list[list[int]], new_tokens: list[int]) -> list[list[int]]:
        token_ids = [openvino.Tensor(np.array([ids], dtype=np.int64)) for ids in prompts]
        outputs = self._pipeline.generate(token_ids, [_greedy(count) for count in new_tokens])
        return [list(output.m_generation_ids[0]) for output in outputs]


def _greedy(count: int) -> Any:
    config = GenerationConfig()
    config.do_sample = False
    config.ignore_eos = True
    config.max_new_tokens = count
    return config


def _converted(folder: Path) -> Path:
    """By a process of its own, whose memory is not the peer's. float16 holds bfloat16 numbers of a weight's size."""
    target = folder.with_name(f"{folder.name}-openvino")
    if not target.is_dir():
        command = [str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino", "--model", str(folder)]
        options = ["--task", "text-generation-with-past", "--weight-format", "fp16"]
        subprocess.run([*command, *options, str(target)], check=True)
    return target


if __name__ == "__main__":
    serve(OpenVinoGenAI)
