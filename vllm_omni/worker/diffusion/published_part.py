"""A part of a published pipeline that runs as diffusers' own module. Knows no model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vllm_omni.errors import CheckpointError
from vllm_omni.utils.checkpoint_files import reading
from vllm_omni.utils.variants import taken_variant, variants_in


def load_part(part: Any, folder: Path, dtype: torch.dtype, variant: str | None = None) -> Any:
    """An instance of the diffusers class `part` with all weights of the folder, on the CPU; CheckpointError where one
    is missing, left over or misshapen, or the folder holds something else. variant: whose files are read, of a folder
    that has them.
    """
    with reading(f"{folder}: {part.__name__}"):
        module, info = part.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            variant=_variant(folder, variant),
            output_loading_info=True,
        )
    refuse_incomplete(info, folder)
    return module.requires_grad_(False).eval()


def vae_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> torch.dtype:
    """Of a VAE, the `config.json` of which is given, in a stage of this dtype: float32 instead of float16 where
    `force_upcast` says that its activations leave the range of float16. bfloat16 has the range of float32.
    """
    return torch.float32 if dtype == torch.float16 and config.get("force_upcast", True) else dtype


def _variant(folder: Path, asked: str | None) -> str | None:
    """Of the files that are taken; None where plain ones are, and where nothing is."""
    found = variants_in(folder)
    return asked if asked in found else taken_variant(found)


def refuse_incomplete(info: dict[str, Any], folder: Path) -> None:
    """CheckpointError when diffusers found weights missing, left over or misshapen."""
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(key):
            raise CheckpointError(f"{folder}: {key.replace('_', ' ')}: {list(info[key])[:3]}")
