"""Denoising steps of a Wan of middle size with random weights, made for the suite and thrown away: the transformer
alone, against that of diffusers, both in bfloat16.

A step is one forward pass of all rows, as each library runs it for one step: the peer is given texts that are filled up
to 512 tokens, as its pipeline does it. It gets its best use: rows of one size in one call.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.dit import largest_difference
from benchmarks.limits import Limits
from benchmarks.measure import Options, Report, Table
from benchmarks.sides import SideProcess, duels

# 178 M parameters; head size, ratios and modulation of the published ones.
MIDDLE: dict[str, Any] = {
    "num_attention_heads": 8,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 1024,
    "ffn_dim": 5888,
    "num_layers": 8,
}
TINY = {**MIDDLE, "num_attention_heads": 1, "ffn_dim": 256, "num_layers": 2}
TEXT_TOKENS, MOST_TEXT_TOKENS, LATENT_PIXELS, LATENT_FRAMES = 40, 512, 8, 4
COLUMNS = ("case", "ours, a second", "diffusers, a second", "ours / diffusers", "largest difference")
DTYPE = "bfloat16"


@dataclass(frozen=True, slots=True)
class Case:
    """sizes: frames and pixels of a side of each row, those of one size beside each other."""

    sizes: tuple[tuple[int, int], ...]

    def latents(self, repeat: int) -> list[Any]:
        import torch

        generator = torch.Generator().manual_seed(repeat)
        shapes = [(1 + (frames - 1) // LATENT_FRAMES, side // LATENT_PIXELS) for frames, side in self.sizes]
        return [torch.randn(16, frames, side, side, generator=generator) for frames, side in shapes]

    def texts(self) -> list[Any]:
        import torch

        generator = torch.Generator().manual_seed(0)
        return [torch.randn(TEXT_TOKENS, MIDDLE["text_dim"], generator=generator) for _ in self.sizes]

    def times(self) -> Any:
        import torch

        return torch.linspace(200.0, 800.0, len(self.sizes))


class Ours:
    """The transformer of a folder. Texts are encoded once per request, not once per step."""

    def __init__(self, folder: str) -> None:
        import torch

        from vllm_omni.layers.weights import allocate, load_weights
        from vllm_omni.models.wan.config import WanConfig
        from vllm_omni.models.wan.transformer import Condition, WanTransformer
        from vllm_omni.utils.precision import DTYPES

        with torch.device("meta"):
            self._model = WanTransformer(WanConfig.from_folder(Path(folder)))
        allocate(self._model, torch.device("cpu"), DTYPES[DTYPE])
        load_weights(self._model, Path(folder))
        self._condition = Condition
        self._encoded: dict[Case, list[Any]] = {}

    def run(self, case: Case, repeat: int) -> list[np.ndarray]:
        import torch

        model = self._model
        with torch.inference_mode():
            if case not in self._encoded:
                self._encoded[case] = [self._condition(model.encode_text(text), False) for text in case.texts()]
            films = model.embed(case.latents(repeat), case.times(), self._encoded[case])
            found = model.unembed(model.run_blocks(films, 0, len(model.blocks)))
        return [velocity.float().numpy() for velocity in found]


class Diffusers:
    """One call for each size."""

    def __init__(self, folder: str) -> None:
        import torch
        from diffusers import WanTransformer3DModel
        from diffusers.utils import logging
        from safetensors.torch import load_file

        logging.set_verbosity_error()
        self._model = WanTransformer3DModel(**WanTransformer3DModel.load_config(folder)).eval().to(torch.bfloat16)
        self._model.load_state_dict(load_file(Path(folder) / "diffusion_pytorch_model.safetensors"))
        for name, part in self._model.named_modules():  # what diffusers keeps wide, with the library accelerate
            if name.rpartition(".")[2] in ("time_embedder", "norm1", "norm2", "norm3"):
                part.float()

    def run(self, case: Case, repeat: int) -> list[np.ndarray]:
        import torch
        import torch.nn.functional as F

        latents, times, found = case.latents(repeat), case.times(), list[np.ndarray]()
        texts = [F.pad(text, (0, 0, 0, MOST_TEXT_TOKENS - TEXT_TOKENS)) for text in case.texts()]
        with torch.inference_mode():
            for _, group in groupby(range(len(latents)), key=lambda row: case.sizes[row]):
                rows = list(group)
                hidden, words = (torch.stack([of[row] for row in rows]).bfloat16() for of in (latents, texts))
                velocities = self._model(hidden, times[rows], words, return_dict=False)[0]
                found += [velocity.float().numpy() for velocity in velocities]
        return found


def run(options: Options, limits: Limits | None = None) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        write_transformer(Path(folder), TINY if options.is_quick else MIDDLE)
        with (
            SideProcess("vllm_omni", options.threads, Ours, folder) as us,
            SideProcess("diffusers", options.threads, Diffusers, folder) as peer,
        ):
            found = duels(us, peer, cases(options), largest_difference, options)
    title = f"Denoising steps of videos, {DTYPE}"
    notes = ["Random weights of middle size: speed and equality only. A step is one pass of all rows together."]
    if limits is not None:
        notes.append(f"Limit: {DTYPE} matrices are multiplied at {limits.gemm_gflop_s[DTYPE]:.0f} GFLOP/s")
    table = Table(title, COLUMNS, [duel.cells() for duel in found])
    return Report("videos", [table], notes, {"duels": [duel.figures() for duel in found]})


def cases(options: Options) -> list[tuple[str, int, Case]]:
    """(name, rows, case)."""
    if options.is_quick:
        return [("2 x 5 frames of 32 px", 2, Case(((5, 32), (5, 32))))]
    return [
        ("1 x 17 frames of 256 px", 1, Case(((17, 256),))),
        ("2 x 17 frames of 256 px", 2, Case(((17, 256),) * 2)),
        ("1 x 33 frames of 384 px", 1, Case(((33, 384),))),
        ("4 of mixed sizes", 4, Case(((9, 192), (9, 192), (17, 128), (5, 256)))),
    ]


def write_transformer(folder: Path, config: dict[str, Any]) -> None:
    import torch
    from diffusers import WanTransformer3DModel

    from benchmarks.random_weights import write_weights

    with torch.device("meta"):
        model = WanTransformer3DModel(**config)
    model.save_config(folder)
    write_weights(model, folder / "diffusion_pytorch_model.safetensors")
