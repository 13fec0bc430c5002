"""Denoising steps of a Z-Image of middle size with random weights, made for the suite and thrown away: the transformer
alone, against that of diffusers, both in one dtype.

A step is one forward pass of all requests' rows, as each library runs it for one step. The peer gets its best use:
rows of one size in one call. It is measured twice, as it is and through torch.compile, whose wait stands apart.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.limits import Limits
from benchmarks.measure import Options, Report, Table
from benchmarks.sides import Duel, SideProcess, duels

# 222 M parameters; head size, ratios and modulation of the published one.
MIDDLE = {
    "dim": 1152,
    "n_layers": 9,
    "n_refiner_layers": 2,
    "n_heads": 9,
    "n_kv_heads": 9,
    "cap_feat_dim": 1024,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
}
SIZES = {  # dtype -> (pixels of a side, numbers of requests)
    "bfloat16": ((256, (1, 2, 4)), (512, (1, 2, 4)), (1024, (1,))),
    "float32": ((256, (1, 4)), (512, (1,))),
}
COMPILED_PIXELS = (256, 512)
TEXT_TOKENS, LATENT_CHANNELS, LATENT_PIXELS, PATCH_PIXELS = 24, 16, 8, 16
COLUMNS = ("case", "ours, a second", "diffusers, a second", "ours / diffusers", "largest difference")


@dataclass(frozen=True, slots=True)
class Case:
    """count: rows of a step."""

    count: int
    pixels: int

    def latents(self, repeat: int) -> Any:
        import torch

        side = self.pixels // LATENT_PIXELS
        generator = torch.Generator().manual_seed(repeat)
        return torch.randn(self.count, LATENT_CHANNELS, side, side, generator=generator)

    def texts(self) -> Any:
        import torch

        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.count, TEXT_TOKENS, int(str(MIDDLE["cap_feat_dim"])), generator=generator)

    def times(self) -> Any:
        import torch

        return torch.linspace(0.2, 0.8, self.count)


class Weights:
    """Writes the random checkpoint, in a process of its own."""

    def write(self, folder: str, is_quick: bool) -> None:
        from benchmarks.gpu_shapes import TINY_QWEN3, TINY_VAE, TINY_Z_IMAGE
        from benchmarks.random_weights import z_image_folder

        transformer = {**TINY_Z_IMAGE, "cap_feat_dim": MIDDLE["cap_feat_dim"]} if is_quick else MIDDLE
        z_image_folder(Path(folder), transformer=transformer, vae=TINY_VAE, text_encoder=TINY_QWEN3)


class Ours:
    """The parts of a loaded stage. Texts are encoded once per request, not once per step."""

    def __init__(self, folder: str, dtype: str) -> None:
        import torch

        from vllm_omni.models.z_image.spec import ZImageSpec
        from vllm_omni.utils.precision import DTYPES

        self._pipeline = ZImageSpec(Path(folder)).load(torch.device("cpu"), DTYPES[dtype])
        self._encoded: dict[Case, list[Any]] = {}

    def run(self, case: Case, repeat: int) -> list[np.ndarray]:
        import torch

        with torch.inference_mode():
            if case not in self._encoded:
                self._encoded[case] = [self._pipeline._encode_text(text) for text in case.texts()]
            found = self._pipeline.transformer(case.latents(repeat), case.times(), self._encoded[case])
        return [velocity.float().numpy() for velocity in found]


class Diffusers:
    """is_compiled: the transformer by torch.compile."""

    def __init__(self, folder: str, dtype: str, is_compiled: bool) -> None:
        import torch
        from diffusers import ZImageTransformer2DModel
        from diffusers.utils import logging

        from vllm_omni.utils.precision import DTYPES

        logging.set_verbosity_error()
        self._dtype = DTYPES[dtype]
        parts = {"dtype": self._dtype, "low_cpu_mem_usage": False}
        self._transformer = ZImageTransformer2DModel.from_pretrained(Path(folder) / "transformer", **parts).eval()
        if is_compiled:
            self._transformer = torch.compile(self._transformer)

    def run(self, case: Case, repeat: int) -> list[np.ndarray]:
        import torch

        latents = case.latents(repeat)
        with torch.inference_mode():
            rows = [latent[:, None].to(self._dtype) for latent in latents]
            texts = list(case.texts().to(self._dtype))
            found = self._transformer(rows, case.times().to(self._dtype), texts, return_dict=False)[0]
        return [velocity[:, 0].float().numpy() for velocity in found]


def run(options: Options, limits: Limits | None = None) -> Report:
    tables, found = [], []
    with tempfile.TemporaryDirectory() as folder:
        with SideProcess("weights", options.threads, Weights) as writer:
            writer.call("write", folder, options.is_quick)
        for dtype in SIZES:
            for title, rows in contests(folder, dtype, options):
                tables.append(Table(f"{title}, {dtype}", COLUMNS, [duel.cells() for duel in rows]))
                found += [{"table": title, "dtype": dtype, **duel.figures()} for duel in rows]
    notes = ["Random weights of middle size: speed and equality only. A step is one pass of all requests together."]
    if limits is not None:
        notes += [step_note(limits, dtype) for dtype in SIZES]
    return Report("dit", tables, notes, {"duels": found})


def contests(folder: str, dtype: str, options: Options) -> Iterator[tuple[str, list[Duel]]]:
    """(title, its rows) of all that is measured in one dtype."""
    with ExitStack() as stack:
        us = stack.enter_context(SideProcess("vllm_omni", options.threads, Ours, folder, dtype))
        with SideProcess("diffusers", options.threads, Diffusers, folder, dtype, False) as peer:
            yield "Denoising steps", duels(us, peer, step_cases(dtype, options), largest_difference, options)
        if dtype == "bfloat16" and not options.is_quick:
            with SideProcess("compiled diffusers", options.threads, Diffusers, folder, dtype, True) as peer:
                yield "Denoising steps against torch.compile", compiled_duels(us, peer, options)


def step_cases(dtype: str, options: Options) -> list[tuple[str, int, Case]]:
    """(name, rows, case)."""
    sizes = ((64, (2,)),) if options.is_quick else SIZES[dtype]
    return [(f"{count} x {pixels} px", count, Case(count, pixels)) for pixels, counts in sizes for count in counts]


def compiled_duels(us: SideProcess, peer: SideProcess, options: Options) -> list[Duel]:
    """One request each; how long the peer's first step took stands in the name."""
    found = []
    for pixels in COMPILED_PIXELS:
        case = Case(1, pixels)
        waited_s, _ = peer.call("run", case, 0)
        name = f"1 x {pixels} px, compiled for {waited_s:.0f} s"
        found += duels(us, peer, [(name, 1, case)], largest_difference, options)
    return found


def largest_difference(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> str:
    """Of velocities, of their peak."""
    peak = max(float(np.abs(b).max()) for b in theirs)
    pairs = zip(ours, theirs, strict=True)
    return f"{max(float(np.abs(a - b).max()) for a, b in pairs) / peak:.1e} of the peak"


def step_note(limits: Limits, dtype: str) -> str:
    """What the products of a step alone take."""
    bounds = ", ".join(
        f"{pixels} px {limits.gemm_gflop_s[dtype] / step_gflop(pixels):.2f}" for pixels, _ in SIZES["bfloat16"]
    )
    return (
        f"Limit: {dtype} matrices are multiplied at {limits.gemm_gflop_s[dtype]:.0f} GFLOP/s with {limits.threads}"
        f" threads, which alone allows at most so many steps of one request a second: {bounds}."
    )


def step_gflop(pixels: int) -> float:
    """Of one request: the products with the blocks' weights, and those of attention."""
    width, blocks = int(str(MIDDLE["dim"])), int(str(MIDDLE["n_layers"]))
    image = (pixels // PATCH_PIXELS) ** 2
    weights = 4 * width**2 + 3 * width * int(width / 3 * 8)
    total = 0.0
    for count, tokens in ((blocks, image + 32), (int(str(MIDDLE["n_refiner_layers"])), image)):
        total += count * (2 * tokens * weights + 4 * tokens**2 * width)
    return total * 1e-9
