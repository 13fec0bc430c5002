"""Devices and dtypes: the only file that names torch.cuda or torch.mps."""

from __future__ import annotations

import platform

import torch

from vllm_omni.errors import ConfigError

# In what torch says of a CPU, an accelerator and the libraries that compute there, in lower case.
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "alloc_failed")
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str = "auto") -> torch.device:
    """'auto' picks CUDA, then MPS, then the CPU; anything else must be a device that is here."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: got {name!r}, expected auto, cpu, cuda, cuda:N or mps") from error
    available = {
        "cpu": True,
        "meta": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(device.type, False):
        raise ConfigError(f"device: got {name!r}, which this machine does not have; use 'auto' or 'cpu'")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """'auto' is bfloat16 on an accelerator and float32 on the CPU."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise ConfigError(f"dtype: got {name!r}, expected auto or one of {', '.join(DTYPES)}")
    return DTYPES[name]


def is_cpu(device: torch.device) -> bool:
    """Whether a processor with its caches computes, no accelerator."""
    return device.type == "cpu"


def multiplies_with_onednn(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN is the faster one at products with weights of this dtype."""
    is_x86_cpu = is_cpu(device) and platform.machine() in ("x86_64", "AMD64")
    return is_x86_cpu and dtype in (torch.float32, torch.bfloat16) and torch.backends.mkldnn.is_available()


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, says that memory could not be had."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(error, RuntimeError) and any(words in str(error).lower() for words in OUT_OF_MEMORY):
            return True
        error = error.__cause__
    return False


def release_memory() -> None:
    """Gives back what the allocators of accelerators keep, though nobody uses it."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def total_memory_bytes(device: torch.device) -> int | None:
    """All memory of an accelerator, None where the operating system decides."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return None
