"""Prompts with media as transformers makes and places them: what readers of Qwen-Omni's prompts are held to."""

from __future__ import annotations

from typing import Any

import torch
from support.speech import CHAT_TEMPLATE
from torch import Tensor

from vllm_omni.worker.ar.media_reading.spans import MediaSpan

VIDEO_SIZE = {"shortest_edge": 128 * 8**2, "longest_edge": 768 * 8**2}  # tokens, as published for larger factors
MERGE = 2  # patches of a token, along each side


def called(processor: Any, messages: list[dict[str, Any]], fps: float = 2.0, **media: Any) -> Any:
    """The library's own call on the same template."""
    text = processor.tokenizer.apply_chat_template(
        messages, chat_template=CHAT_TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    videos = {"videos_kwargs": {"size": VIDEO_SIZE, "fps": fps}} if "videos" in media else {}
    return processor(text=[text], return_tensors="pt", **videos, **media)


def expected_positions(
    thinker: Any, ids: list[int], placed: list[tuple[int, MediaSpan]], sounds: list[int], with_tracks: bool
) -> tuple[Tensor, Tensor]:
    """[3, T] of the library's model, and what is added to positions behind. sounds: frames of each, in order."""

    def thw(kind: str) -> Any:
        found = [[s.grid[0], s.grid[1] * MERGE, s.grid[2] * MERGE] for _, s in placed if s.kind == kind and s.grid]
        return torch.tensor(found) if found else None

    tokens = torch.tensor([ids])
    rates = [span.second_per_grid for _, span in placed if span.kind == "video"]
    expected, delta = thinker.get_rope_index(
        tokens,
        image_grid_thw=thw("image"),
        video_grid_thw=thw("video"),
        attention_mask=torch.ones_like(tokens),
        use_audio_in_video=with_tracks,
        audio_seqlens=torch.tensor(sounds) if sounds else None,
        second_per_grids=torch.tensor(rates) if rates else None,
    )
    return expected[:, 0], delta
