"""A peer's process that answers the benchmarks' protocol with a loop over transformers' model, without a KV cache.

A thread of it spins, as those of some engines do while they wait.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

from benchmarks.peers.protocol import serve


class FakePeer:
    def __init__(self, folder: str, dtype: str, threads: int) -> None:
        import torch  # late: one that is broken says so at once
        from transformers import Qwen3ForCausalLM

        print("loading", folder)  # libraries print where answers are expected
        torch.set_num_threads(threads)
        self._model = Qwen3ForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        threading.Thread(target=spin, daemon=True).start()

    def write(self, prompts: list[list[int]], new_tokens: list[int]) -> list[list[int]]:
        import torch

        with torch.inference_mode():
            return [self._write_one(torch.tensor([ids]), count) for ids, count in zip(prompts, new_tokens, strict=True)]

    def _write_one(self, prompt: Any, count: int) -> list[int]:
        import torch

        ids = prompt
        for _ in range(count):
            ids = torch.cat([ids, self._model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        written: list[int] = ids[0, prompt.shape[1] :].tolist()
        return written


def spin() -> None:
    while True:
        time.sleep(0)  # lets the others have the interpreter


if __name__ == "__main__":
    if "broken" in sys.argv:
        sys.exit("no such processor")
    serve(FakePeer)
