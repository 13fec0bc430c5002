"""Random LoRA files for small models, by every naming, and the same models with them merged."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)
STD = 0.15


@dataclass(frozen=True)
class RandomLoRA:
    """layer -> (down [r, in], up [out, r], alpha)."""

    layers: Mapping[str, tuple[Tensor, Tensor, float | None]]

    def as_peft(self, prefix: str = "transformer.") -> dict[str, Tensor]:
        """As diffusers and PEFT write it; alphas beside, where there are some."""
        tensors: dict[str, Tensor] = {}
        for name, (down, up, alpha) in self.layers.items():
            tensors[f"{prefix}{name}.lora_A.weight"] = down
            tensors[f"{prefix}{name}.lora_B.weight"] = up
            if alpha is not None:
                tensors[f"{prefix}{name}.alpha"] = torch.tensor(alpha)
        return tensors

    def as_kohya(self, prefix: str = "lora_unet_") -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, (down, up, alpha) in self.layers.items():
            flat = prefix + name.replace(".", "_")
            tensors[f"{flat}.lora_down.weight"] = down
            tensors[f"{flat}.lora_up.weight"] = up
            tensors[f"{flat}.alpha"] = torch.tensor(float(len(down)) if alpha is None else alpha)
        return tensors

    def save(self, file: Path, tensors: Mapping[str, Tensor] | None = None) -> Path:
        save_file({name: tensor.contiguous() for name, tensor in (tensors or self.as_peft()).items()}, file)
        return file


def random_lora(
    model: nn.Module,
    seed: int,
    rank: int = 4,
    alpha: float | None = None,
    chosen: Callable[[str], bool] = lambda name: True,
    std: float = STD,
) -> RandomLoRA:
    """Of the linear layers of a reference model, as it calls them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    linears = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear) and chosen(name)}
    assert linears
    return RandomLoRA(
        {name: (draw(rank, part.in_features), draw(part.out_features, rank), alpha) for name, part in linears.items()}
    )


def merged(model: M, loras: Sequence[tuple[RandomLoRA, float]]) -> M:
    """A copy whose weights are W + scale * alpha / r * up @ down."""
    other = copy.deepcopy(model)
    for lora, scale in loras:
        for name, (down, up, alpha) in lora.layers.items():
            factor = 1.0 if alpha is None else alpha / len(down)
            other.get_submodule(name).weight.data.add_(scale * factor * up @ down)  # type: ignore[operator, union-attr]
    return other
