"""A whole Wan folder from words to frames, its text encoder included, against diffusers' pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from support.wan import random_pipeline

from vllm_omni import DiffusionParams, Omni
from vllm_omni.errors import InvalidRequestError


def test_words_become_the_video_of_the_reference(tmp_path: Path) -> None:
    """Entities and spaces of prompts are cleaned, long ones lose their end, a negative prompt stands beside them."""
    pipeline = random_pipeline(tmp_path, text=True)
    asked = [
        {"prompt": "a red  circle &amp;amp; a blue\nsquare", "negative_prompt": "green"},
        {"prompt": "red blue circle " * 300},
    ]
    sizes = dict(height=32, width=64, num_frames=5, num_inference_steps=3, guidance_scale=4.0)
    with Omni(model=str(tmp_path), device="cpu", dtype="float32", progress=False) as omni:
        outs = omni.generate(asked, DiffusionParams(**sizes, seed=5, fps=12))
        for out, words in zip(outs, asked, strict=True):
            assert out.error is None, out.error
            theirs = pipeline(**words, **sizes, generator=torch.Generator().manual_seed(5), output_type="np").frames[0]
            video = out.videos[0]
            assert video.fps == 12 and video.frames.shape == (5, 32, 64, 3)
            assert np.abs(np.asarray(video.frames).astype(int) - (theirs * 255).round()).max() <= 2
        again, wrong = omni.generate([asked[0], {"prompt": [1, 2, 3]}], DiffusionParams(**sizes, seed=6))
        assert again.metrics["text"]["ran_s"] == 0, "words that were encoded before are not encoded again"
        assert isinstance(wrong.error, InvalidRequestError) and "expected a string" in str(wrong.error)
