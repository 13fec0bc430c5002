"""Which dtype a stage computes in and why, and whether its weights are quantised. Is told what its checkpoint was
published in; reads no files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_omni.errors import ConfigError
from vllm_omni.utils.device import is_cpu, multiplies_bfloat16

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INT8 = "int8"
HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Precision:
    """Of the weights and activations of one stage."""

    dtype: torch.dtype
    reason: str  # a few words
    quantization: str | None = None  # "int8": what the weights that can be are held in

    @property
    def name(self) -> str:
        """Of all of it: two stages of one name compute alike."""
        return dtype_name(self.dtype) + (f" with {self.quantization} weights" if self.quantization else "")

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def choose_precision(name: str, device: torch.device, published: Callable[[], torch.dtype | None]) -> Precision:
    """name: of a dtype, or 'auto' for the fastest that keeps what was published: bfloat16 on an accelerator, and for
    weights of 16 bits on a CPU that multiplies it; else float32. Never float16, which CPUs are slow at.

    published: what the weights were published in, None where nothing says so; asked only where it decides.
    """
    if name != "auto":
        if name not in DTYPES:
            raise ConfigError(f"dtype: got {name!r}, expected auto or one of {', '.join(DTYPES)}")
        return Precision(DTYPES[name], "as configured")
    if not is_cpu(device):
        return Precision(torch.bfloat16, f"auto on {device.type}")
    if not multiplies_bfloat16(device):
        return Precision(torch.float32, "this CPU does not multiply bfloat16")
    found = published()
    if found is None:
        return Precision(torch.float32, "no weights say otherwise")
    if found not in HALVES:
        return Precision(torch.float32, f"published in {dtype_name(found)}")
    it = "it" if found == torch.bfloat16 else "bfloat16"
    return Precision(torch.bfloat16, f"published in {dtype_name(found)}; this CPU multiplies {it}")


def choose_quantization(asked: str, device: torch.device, published: str | None, *, can_quantize: bool) -> str | None:
    """ "int8" or None. asked: that, "none", or "auto" for what was published. published: None, "int8" or "float8", of
    which the latter is read as numbers of the stage's dtype. ConfigError where int8 is asked of what cannot have it.
    """
    if asked == "auto":
        return published if published == INT8 and can_quantize and is_cpu(device) else None
    if asked == "none":
        return None
    if not can_quantize:
        raise ConfigError(
            f"quantization: got {asked!r}, expected none: of this stage no weights can be held in int8; remove the key"
        )
    if not is_cpu(device):
        raise ConfigError(
            f"quantization: got {asked!r} on {device.type}, expected none: int8 is for CPUs; remove the key"
        )
    return asked


def dtype_name(dtype: torch.dtype) -> str:
    """As the config's keys write it."""
    return str(dtype).removeprefix("torch.")
