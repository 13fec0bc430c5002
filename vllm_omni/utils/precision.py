"""Which dtype a stage computes in and why, and whether its weights are quantised. Is told what its checkpoint was
published in; reads no files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_omni.errors import ConfigError
from vllm_omni.utils.device import compute_capability, is_cpu, is_cuda, multiplies_bfloat16

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INT8, FP8, HELD_IN_HALVES = "int8", "fp8", "bfloat16"
PUBLISHED = {"int8": INT8, "float8": FP8}  # what weights were published in -> what they may stay in
FP8_CAPABILITY = (8, 9)  # Ada
HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Precision:
    """Of the weights and activations of one stage."""

    dtype: torch.dtype
    reason: str  # a few words
    quantization: str | None = None  # "int8", "fp8", "bfloat16": what weights are held in that can be

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


def choose_quantization(
    asked: str,
    device: torch.device,
    dtype: torch.dtype,
    published: str | None,
    *,
    can_quantize: bool,
    keeps_halves: Callable[[], bool] = lambda: False,
) -> str | None:
    """What weights are held in, where it is not the stage's dtype: "int8", "fp8" or "bfloat16". asked: one of them,
    "none", or "auto" for what was published, as far as that costs neither precision nor speed. ConfigError where it is
    asked of what cannot have it.

    published: None, "int8" or "float8", which are read as numbers of the stage's dtype where the device multiplies
    something else. keeps_halves: whether they were published in bfloat16, and are multiplied so beside float32; asked
    only where it decides.
    """
    if asked == "auto":
        if not can_quantize:
            return None
        kept = HELD_IN_HALVES if published is None else PUBLISHED[published]
        fits = _complaint(kept, device, dtype) is None and (published is not None or keeps_halves())
        return kept if fits else None
    if asked == "none":
        return None
    if not can_quantize:
        raise ConfigError(
            f"quantization: got {asked!r}, expected none: of this stage no weights can be quantised; remove the key"
        )
    complaint = _complaint(asked, device, dtype)
    if complaint is not None:
        raise ConfigError(f"quantization: got {asked!r} on {device.type}, expected none: {complaint}; remove the key")
    return asked


def _complaint(quantization: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why weights are not held so on a device, in a stage of this dtype."""
    if quantization == HELD_IN_HALVES:
        is_taken = is_cpu(device) and dtype == torch.float32
        return None if is_taken else f"bfloat16 is for float32 on CPUs, not for {dtype_name(dtype)} on {device.type}"
    if quantization == INT8:
        return None if is_cpu(device) else "int8 is for CPUs"
    if not is_cuda(device):
        return "fp8 is for CUDA"
    has_units = compute_capability(device) >= FP8_CAPABILITY
    return None if has_units else "this GPU does not multiply float8 (compute capability 8.9 or later does)"


def dtype_name(dtype: torch.dtype) -> str:
    """As the config's keys write it."""
    return str(dtype).removeprefix("torch.")
