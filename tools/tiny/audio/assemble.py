"""Puts the trained parts into one folder that `diffusers.AceStepPipeline.from_pretrained` loads, all weights in
bfloat16.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import AceStepPipeline, AceStepTransformer1DModel, AutoencoderOobleck, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.ace_step import AceStepConditionEncoder
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast, Qwen3Model

from tools.tiny.audio.train_audio import export

CARD = """# tiny-audio

A text-to-sound model of notes and chords in the format of diffusers' AceStepPipeline (16 kHz, mono, two
seconds long), trained from scratch for this package by `python -m tools.tiny.audio.train` on sounds that the tool plays
itself. Its text encoder also rewrites loose requests into lines of canonical words, for this model and for tiny-image.
It knows no lyrics, no tempo and no key. Apache-2.0.
"""


def assemble(runs: Path, folder: Path) -> None:
    """`runs` holds text/, audio/, decoder/ and data.safetensors as the training scripts leave them."""
    shutil.rmtree(folder, ignore_errors=True)
    state = torch.load(runs / "audio/checkpoint.pt", weights_only=True)
    export(runs / "export", state, load_file(runs / "data.safetensors"))
    dtype = torch.bfloat16
    pipeline = AceStepPipeline(
        vae=AutoencoderOobleck.from_pretrained(runs / "decoder/vae", dtype=dtype),
        text_encoder=Qwen3Model.from_pretrained(runs / "text/text_encoder", dtype=dtype),
        tokenizer=PreTrainedTokenizerFast.from_pretrained(runs / "text/tokenizer"),
        transformer=AceStepTransformer1DModel.from_pretrained(runs / "export/transformer", dtype=dtype),
        condition_encoder=AceStepConditionEncoder.from_pretrained(runs / "export/condition_encoder", dtype=dtype),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "PreTrainedTokenizerFast"]  # its name in every version
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "README.md").write_text(CARD)
