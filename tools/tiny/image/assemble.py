"""Puts the trained parts into one folder that `diffusers.ZImagePipeline.from_pretrained` loads, all weights in
bfloat16.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from transformers import Qwen3ForCausalLM

from tools import fit_preview
from tools.tiny.image.train_image import TIME_SHIFT, export, whitening_of

MODEL_INDEX = {
    "_class_name": "ZImagePipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3ForCausalLM"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "ZImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
CARD = """# tiny-image

A text-to-image model of coloured shapes in the format of diffusers' ZImagePipeline, trained from scratch for this
package by `python -m tools.tiny.image.train` on pictures that the tool draws itself. Its text encoder also rewrites
loose requests into the canonical words that the image model knows. Apache-2.0.
"""


def assemble(runs: Path, folder: Path, num_pictures: int = 200) -> None:
    """`runs` holds text/, vae/ and image/ as the training scripts leave them; the map of previews is fitted to so many
    pictures.
    """
    shutil.rmtree(folder, ignore_errors=True)
    text = Qwen3ForCausalLM.from_pretrained(runs / "text/text_encoder", dtype=torch.bfloat16)
    text.save_pretrained(folder / "text_encoder")
    shutil.copytree(runs / "text/tokenizer", folder / "tokenizer")
    AutoencoderKL.from_pretrained(runs / "vae/vae", dtype=torch.bfloat16).save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(shift=TIME_SHIFT).save_pretrained(folder / "scheduler")
    state = torch.load(runs / "image/checkpoint.pt", weights_only=True)
    data = load_file(runs / "data.safetensors")
    export(folder / "transformer", state["average"], whitening_of(data))
    (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n")
    (folder / "README.md").write_text(CARD)
    fit_preview.main([str(folder), "--count", str(num_pictures)])
