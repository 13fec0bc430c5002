"""Denoising steps of a Z-Image of middle size with random weights, each request with a LoRA of its own, against the
same steps without any. In one process, in turn, of the same weights: the difference is what adapters cost.

Every linear layer of every block is adapted, which is more than most published files do.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.dit import LATENT_CHANNELS, LATENT_PIXELS, MIDDLE, TEXT_TOKENS, Weights
from benchmarks.limits import Limits
from benchmarks.measure import Options, Report, Table
from benchmarks.sides import Duel, SideProcess

RANK = 16
ADAPTERS = 4
SIZES = {"bfloat16": (256, 512), "float32": (256,)}  # pixels of a side
COLUMNS = ("case", "with adapters, a second", "without, a second", "with / without", "largest difference")


@dataclass(frozen=True, slots=True)
class Case:
    """A step of `count` requests; adapted: each with an adapter of its own."""

    pixels: int
    is_adapted: bool
    count: int = ADAPTERS


class Ours:
    """The parts of a loaded stage, and the adapters."""

    def __init__(self, folder: str, dtype: str) -> None:
        import torch

        from vllm_omni.models.z_image.spec import ZImageSpec
        from vllm_omni.utils.precision import DTYPES

        spec = ZImageSpec(Path(folder))
        self._pipeline = spec.load(torch.device("cpu"), DTYPES[dtype])
        self._mixes = [self._mix(spec, Path(folder), index, DTYPES[dtype]) for index in range(ADAPTERS)]

    def run(self, case: Case, repeat: int) -> list[np.ndarray]:
        import torch

        from vllm_omni.layers.lora import adapted, packed

        transformer, config = self._pipeline.transformer, self._pipeline.transformer.config
        side, generator = case.pixels // LATENT_PIXELS, torch.Generator().manual_seed(repeat)
        latents = torch.randn(case.count, LATENT_CHANNELS, side, side, generator=generator)
        texts = torch.randn(case.count, TEXT_TOKENS + 8, config.dim, generator=generator)
        times = torch.linspace(0.2, 0.8, case.count)
        mixes = self._mixes if case.is_adapted else [None] * case.count
        with torch.inference_mode(), adapted(mixes):
            tokens = transformer.embed(latents, times, texts.to(transformer.x_pad_token.dtype))
            with packed(tokens.order, *tokens.packings):
                tokens = transformer.run_blocks(tokens, 0, len(transformer.layers))
                found = transformer.unembed(tokens)
        return [velocity.float().numpy() for velocity in found]

    def _mix(self, spec: Any, folder: Path, index: int, dtype: Any) -> Any:
        import torch
        from safetensors.torch import save_file

        from vllm_omni.layers.linear import Linear
        from vllm_omni.layers.lora import AdapterMix
        from vllm_omni.layers.weights import tensor_shapes
        from vllm_omni.worker.lora.folders import LoRAFile
        from vllm_omni.worker.lora.loading import load_adapter
        from vllm_omni.worker.lora.plan import plan_lora
        from vllm_omni.worker.lora.target import LoRATarget

        shapes = tensor_shapes(folder / "transformer")
        model, generator = spec.build_transformer(), torch.Generator().manual_seed(index)
        target, tensors = LoRATarget(model, shapes, {}), {}
        linears = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, Linear)}
        for name, shape in shapes.items():
            located = model.locate(name)
            if len(shape) == 2 and ("layers." in name or "refiner" in name) and located.parameter in linears:
                layer = name.removesuffix(".weight")
                tensors[f"{layer}.lora_A.weight"] = torch.randn(RANK, shape[1], generator=generator) * 0.05
                tensors[f"{layer}.lora_B.weight"] = torch.randn(shape[0], RANK, generator=generator) * 0.05
        file = folder / f"{index}.safetensors"
        save_file(tensors, file)
        plan = plan_lora(LoRAFile.of(file), target, RANK)
        adapter = load_adapter(plan, self._pipeline.transformer, torch.device("cpu"), dtype)
        return AdapterMix(str(index), ((adapter, 1.0),))


def run(options: Options, limits: Limits | None = None) -> Report:
    tables, figures = [], []
    with tempfile.TemporaryDirectory() as folder:
        with SideProcess("weights", options.threads, Weights) as writer:
            writer.call("write", folder, options.is_quick)
        for dtype in SIZES:
            rows = list(contests(folder, dtype, options))
            tables.append(
                Table(f"Steps of {ADAPTERS} requests, rank {RANK}, {dtype}", COLUMNS, [cells(r) for r in rows])
            )
            figures += [{"dtype": dtype, **row.figures()} for row in rows]
    notes = [
        "Random weights of middle size: speed alone. With / without: times, 1.00 would be free.",
        f"Limit: of the products with the blocks' weights, those of rank {RANK} are {extra_share():.1%}.",
    ]
    return Report("lora", tables, notes, {"duels": figures})


def contests(folder: str, dtype: str, options: Options) -> Iterator[Duel]:
    with SideProcess("vllm_omni", options.threads, Ours, folder, dtype) as side:
        for pixels in (64,) if options.is_quick else SIZES[dtype]:
            plain, with_adapters = Case(pixels, False), Case(pixels, True)
            duel = Duel(f"{ADAPTERS} x {pixels} px", ADAPTERS)
            answers = [side.call("run", case, 0)[1] for case in (with_adapters, plain)]
            duel.agreement = largest_difference(*answers)
            done, spent_s = 0, 0.0
            while not options.is_enough(done, spent_s):
                done += 1
                duel.us_s.append(side.call("run", with_adapters, done)[0])
                duel.peer_s.append(side.call("run", plain, done)[0])
                spent_s += duel.us_s[-1] + duel.peer_s[-1]
            yield duel


def cells(duel: Duel) -> list[str]:
    case, ours, theirs, _, agreement = duel.cells()
    ratios = sorted(us / peer for us, peer in zip(duel.us_s, duel.peer_s, strict=True))
    middle = ratios[len(ratios) // 2]
    return [case, ours, theirs, f"{middle:.2f} ({ratios[0]:.2f} - {ratios[-1]:.2f})", agreement]


def largest_difference(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> str:
    """What the adapters change, of the peak: not nothing."""
    peak = max(float(np.abs(b).max()) for b in theirs)
    return f"{max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True)) / peak:.1e} of the peak"


def extra_share() -> float:
    """Multiplications of the adapters, of those of the weights that they adapt, in a block."""
    width = int(str(MIDDLE["dim"]))
    hidden = int(width / 3 * 8)
    layers = [(width, width)] * 4 + [(width, hidden)] * 2 + [(hidden, width)]
    return sum(RANK * (a + b) for a, b in layers) / sum(a * b for a, b in layers)
