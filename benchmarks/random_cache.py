"""Step caches on a Z-Image of middle size with random weights, made for the suite and thrown away: how far their
latents are from those of all steps computed, against fewer steps without one. Nobody can judge such a picture.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.limits import Limits
from benchmarks.measure import ROOT, Options, Report
from benchmarks.sides import SideProcess
from benchmarks.step_caches import Subject, run_subject

PICTURE = ROOT / "benchmarks" / "results" / "random_cache.png"
STEPS, FEWER_STEPS = 20, (2, 4, 6, 8, 10, 13, 16)
FITTED_ON = ("a lighthouse at dusk", "a bowl of oranges", "an old sailor", "a red circle")
# 47 M parameters in the blocks; head size, ratios and modulation of the published one.
MIDDLE = {
    "dim": 640,
    "n_layers": 10,
    "n_refiner_layers": 1,
    "n_heads": 5,
    "n_kv_heads": 5,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
}
PIXELS, QUICK_PIXELS = 128, 64


class Weights:
    """Writes the random checkpoint, in a process of its own."""

    def write(self, folder: str, is_quick: bool) -> None:
        from benchmarks.gpu_shapes import TINY_QWEN3, TINY_VAE, TINY_Z_IMAGE
        from benchmarks.random_weights import z_image_folder

        shape: dict[str, Any] = {**(TINY_Z_IMAGE if is_quick else MIDDLE), "cap_feat_dim": TINY_QWEN3["hidden_size"]}
        text = {**TINY_QWEN3, "vocab_size": 1024}  # the tokenizer's 584 and more
        z_image_folder(Path(folder), transformer=shape, vae=TINY_VAE, text_encoder=text)


def prompts(count: int) -> list[tuple[str, Any]]:
    words = ("a red circle left of a blue square", "a large pink star", "a small green ring", "a grey square")
    return [(words[index % len(words)], None) for index in range(count)]


def run(options: Options, limits: Limits | None = None) -> Report:
    side = QUICK_PIXELS if options.is_quick else PIXELS
    params = {"height": side, "width": side, "guidance_scale": 0.0}
    subject = Subject(
        "random_cache", "z_image", "image", STEPS, FEWER_STEPS, 0, FITTED_ON, prompts, params=params, looser=4.0
    )
    with tempfile.TemporaryDirectory() as folder:
        with SideProcess("weights", options.threads, Weights) as weights:
            weights.call("write", folder, options.is_quick)
        num_blocks = 2 if options.is_quick else int(str(MIDDLE["n_layers"]))
        return run_subject(dataclasses.replace(subject, model=folder, num_blocks=num_blocks), options, 2, PICTURE)
