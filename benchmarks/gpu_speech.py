"""Qwen3-TTS on a GPU: a folder of a published shape with random weights, and how fast it speaks."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measure import median
from benchmarks.qwen3_tts.published import GENERATION, published_config, published_tokenizer_config
from benchmarks.qwen3_tts.tokenizer import write_text_tokenizer
from benchmarks.random_weights import write_weights

SIZE, TASK = "0.6B", "custom_voice"
FRAMES_PER_S = 12.5
TEXT = "the quick brown fox jumps over the lazy dog"
PLAIN_ROPE = {"rope_type": "default"}
TINY_DECODER = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_scaling": PLAIN_ROPE,
}
TINY_TALKER = {**TINY_DECODER, "text_hidden_size": 64}
TINY_CODEC = {"decoder_dim": 96, "hidden_size": 64, "intermediate_size": 96, "latent_dim": 64, "num_hidden_layers": 2}


def speech_folder(folder: Path, talker: Mapping[str, Any], codec: Mapping[str, Any]) -> Path:
    """A checkpoint with named voices; of the published shape, but for these keys of the talker, of its code predictor,
    and of the decoder of its codec.
    """
    from vllm_omni.models.qwen3_tts.codec.config import CodecDecoderConfig
    from vllm_omni.models.qwen3_tts.codec.decoder import CodecDecoder
    from vllm_omni.models.qwen3_tts.config import TalkerConfig
    from vllm_omni.models.qwen3_tts.talker import Talker

    config, described = published_config(SIZE, TASK), published_tokenizer_config()
    predictor = {key: value for key, value in talker.items() if key in TINY_DECODER}
    config["talker_config"] |= talker
    config["talker_config"]["code_predictor_config"] |= predictor
    described["decoder_config"] |= codec
    write_text_tokenizer(folder)
    speech = folder / "speech_tokenizer"
    speech.mkdir(exist_ok=True)
    files = {"config.json": config, "generation_config.json": GENERATION, "speech_tokenizer/config.json": described}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    with torch.device("meta"):
        speaker = Talker(TalkerConfig.from_json(config, "config.json"))
        decoder = CodecDecoder(CodecDecoderConfig.of_residual_codes(described["decoder_config"], "config.json"))
    write_weights(nn.ModuleDict({"talker": speaker}), folder / "model.safetensors")
    write_weights(nn.ModuleDict({"decoder": decoder}), speech / "model.safetensors")
    return folder


class Speaker:
    """All requests at once, each a stream of as many frames, drawn as published."""

    def __init__(self, folder: Path, device: str, *keys: str) -> None:
        from vllm_omni import AsyncOmni

        self._omni = AsyncOmni("qwen3_tts", model=str(folder), device=device, overrides=list(keys))

    def __enter__(self) -> Speaker:
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run(self._omni.shutdown())

    def figures(self, count: int, frames: int, repeats: int) -> dict[str, float]:
        """Medians of what is timed after one run that is not."""
        runs = [asyncio.run(self._run(count, frames, repeat)) for repeat in range(repeats + 1)][1:]
        took_s = median([took_s for took_s, _ in runs])
        name = f"{count} speeches"
        return {
            f"{name}, frames/s": count * frames / took_s,
            f"{name}, all sound after, s": median([first_s for _, first_s in runs]),
            f"{name}, s of time per s of sound": took_s * FRAMES_PER_S / frames,
        }

    async def _run(self, count: int, frames: int, repeat: int) -> tuple[float, float]:
        begun = time.perf_counter()
        firsts = await asyncio.gather(*(self._listen(frames, repeat * count + index, begun) for index in range(count)))
        return time.perf_counter() - begun, max(firsts)

    async def _listen(self, frames: int, seed: int, begun: float) -> float:
        from vllm_omni import SamplingParams

        prompt = {"prompt": f"{seed} {TEXT}", "voice": "ryan", "language": "english"}
        params = {"talker": SamplingParams(seed=seed, max_tokens=frames, ignore_eos=True)}
        output, first_s = None, None
        async for output in self._omni.stream(prompt, params):
            if first_s is None and output.audios:
                first_s = time.perf_counter() - begun
        if output is None or output.error is not None or first_s is None:
            raise RuntimeError(f"no sound: {output}")
        return first_s
