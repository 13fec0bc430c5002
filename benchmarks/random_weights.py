"""Checkpoint folders of a published shape with random weights, written without building the model: one block of random
numbers over and over, since only their distribution matters to a speed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

BLOCK = 2**22  # numbers
ONES = ("running_var", "usage", "initialized")  # variances, and what codebooks count
SPREAD = 0.02  # as language models are initialised


def qwen3_folder(folder: Path, config: Mapping[str, Any]) -> Path:
    """A dense Qwen3 without a tokenizer: it is given token ids."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    described = Qwen3Config(**config, architectures=["Qwen3ForCausalLM"], eos_token_id=0, pad_token_id=0)
    with torch.device("meta"):
        model = Qwen3ForCausalLM(described)
    described.save_pretrained(folder)
    tied = {"lm_head.weight"} if described.tie_word_embeddings else set()
    write_weights(model, folder / "model.safetensors", leave_out=tied)
    return folder


def z_image_folder(
    folder: Path, *, transformer: Mapping[str, Any], vae: Mapping[str, Any], text_encoder: Mapping[str, Any]
) -> Path:
    """A Z-Image pipeline with the tokenizer of the small model that ships."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel

    qwen3_folder(folder / "text_encoder", text_encoder)
    models = {"transformer": (ZImageTransformer2DModel, transformer), "vae": (AutoencoderKL, vae)}
    return _pipeline_folder(folder, "ZImagePipeline", models, FlowMatchEulerDiscreteScheduler(shift=3.0))


def klein_folder(folder: Path, *, transformer: Mapping[str, Any], vae: Mapping[str, Any], text_encoder: Path) -> Path:
    """A distilled FLUX.2 [klein] pipeline, likewise. text_encoder: a folder of `qwen3_folder`, which is not copied."""
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel

    models = {"transformer": (Flux2Transformer2DModel, transformer), "vae": (AutoencoderKLFlux2, vae)}
    sampler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    _pipeline_folder(folder, "Flux2KleinPipeline", models, sampler, is_distilled=True)
    (folder / "text_encoder").symlink_to(text_encoder.resolve(), target_is_directory=True)
    return folder


def _pipeline_folder(
    folder: Path, name: str, models: Mapping[str, tuple[Any, Mapping[str, Any]]], sampler: Any, **index: Any
) -> Path:
    import shutil

    from vllm_omni.utils.files import resolve_model_folder

    for part, (build, config) in models.items():
        with torch.device("meta"):
            model = build(**config)
        model.save_config(folder / part)
        write_weights(model, folder / part / "diffusion_pytorch_model.safetensors")
    sampler.save_pretrained(folder / "scheduler")
    shipped = resolve_model_folder("asset://tiny-image")
    shutil.copytree(shipped / "tokenizer", folder / "tokenizer")
    described = json.loads((shipped / "model_index.json").read_text())
    described |= {"_class_name": name, **index}
    described |= {part: ["diffusers", build.__name__] for part, (build, _) in models.items()}
    (folder / "model_index.json").write_text(json.dumps(described))
    return folder


def write_weights(model: nn.Module, path: Path, leave_out: set[str] | frozenset[str] = frozenset()) -> None:
    """The state of a model on the meta device, in bfloat16: ones for scales of norms and for ONES, noise besides."""
    shapes = {name: tuple(state.shape) for name, state in model.state_dict().items() if name not in leave_out}
    header, start = {}, 0
    for name, shape in shapes.items():
        stop = start + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    written = json.dumps(header).encode()
    written += b" " * (-len(written) % 8)
    noise = _as_bytes(torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)) * SPREAD)
    ones = _as_bytes(torch.ones(BLOCK))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(written).to_bytes(8, "little") + written)
        for name, shape in shapes.items():
            is_scale = "norm" in name and len(shape) == 1 and name.endswith("weight")
            block = ones if is_scale or name.endswith(ONES) else noise
            left = 2 * math.prod(shape)
            while left:
                left -= file.write(block[:left])


def _as_bytes(numbers: torch.Tensor) -> memoryview:
    return memoryview(numbers.bfloat16().view(torch.int16).numpy().tobytes())
