"""The qwen-tts package as a peer: run by the Python of its own environment. It speaks one batch of texts at once, and
gives all sound at the end.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.peers.protocol import serve
from benchmarks.peers.qwen_tts_package import qwen_tts


class QwenTTS:
    def __init__(self, folder: str, dtype: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model: Any = qwen_tts().Qwen3TTSModel.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
        self._codes: list[list[list[int]]] = []
        plain = self._model.model.generate

        def generate(**asked: Any) -> Any:
            made = plain(**asked)
            self._codes = [codes.tolist() for codes in made[0]]
            return made

        self._model.model.generate = generate

    def speak(self, texts: list[str], speaker: str, language: str, frames: int) -> list[list[list[int]]]:
        """Codes [frames, 16] of each text, greedy, its sound made and thrown away; one frame more is begun."""
        greedy = {"do_sample": False, "subtalker_dosample": False, "max_new_tokens": frames + 1}
        count = len(texts)
        self._model.generate_custom_voice(
            text=texts, speaker=[speaker] * count, language=[language] * count, non_streaming_mode=True, **greedy
        )
        return self._codes


if __name__ == "__main__":
    serve(QwenTTS)
