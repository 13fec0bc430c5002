"""A peer's process that answers the benchmarks' protocol with a loop over transformers' model, without a KV cache.

A thread of it spins, as those of some engines do while they wait.
"""

from __future__ import annotations

import sys
import threading

import torch
from transformers import Qwen3ForCausalLM

from benchmarks.peers.protocol import serve


class FakePeer:
    def __init__(self, folder: str, dtype: str, threads: int) -> None:
        print("loading", folder)  # libraries print where answers are expected
        torch.set_num_threads(threads)
        self._model = Qwen3ForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        threading.Thread(target=spin, daemon=True).start()

    @torch.inference_mode()
    def write(self, prompts: list[list[int]], new_tokens: list[int]) -> list[list[int]]:
        return [self._write_one(ids, count) for ids, count in zip(prompts, new_tokens, strict=True)]

    def _write_one(self, prompt: list[int], count: int) -> list[int]:
        ids = torch.tensor([prompt])
        for _ in range(count):
            ids = torch.cat([ids, self._model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        return ids[0, len(prompt) :].tolist()


def spin() -> None:
    while True:
        pass


if __name__ == "__main__":
    if "broken" in sys.argv:
        sys.exit("no such processor")
    serve(FakePeer)
