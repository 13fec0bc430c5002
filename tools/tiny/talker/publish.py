"""Puts the trained parts into one folder as Qwen3-TTS is published, in bfloat16."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tools.tiny.talker.shapes import GENERATION, MARKS, codec_config, model_config
from tools.tiny.talker.spoken import Spoken
from tools.tiny.talker.train_codec import Codec
from vllm_omni.layers.linear import MergedLinear
from vllm_omni.models.qwen3_tts.codec.codebooks import FIRST, REST, SUMS, USAGE
from vllm_omni.models.qwen3_tts.codec.convolution import CausalConv, DepthwiseConv, TransposedConv
from vllm_omni.models.qwen3_tts.talker import Talker

CODEC_FOLDER, WEIGHTS = "speech_tokenizer", "model.safetensors"
CARD = """# tiny-talker

A model that says one to five words it knows, in the format of Qwen3-TTS (24 kHz, 12.5 frames a second, one English
voice, "reader"), trained from scratch for this package by `python -m tools.tiny.talker.train` on words that espeak-ng
speaks. It clones no voice: its `speech_tokenizer` has no encoder. Apache-2.0.
"""
TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "processor_class": "Qwen3TTSProcessor",
    "eos_token": MARKS[2],
    "pad_token": MARKS[0],
    "model_max_length": 1024,
}


def publish(folder: Path, spoken: Spoken, codec: Codec, talker: Talker) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / CODEC_FOLDER).mkdir(parents=True)
    save(folder, model_config(spoken.vocab_size), dict(talker_tensors(talker)))
    save(folder / CODEC_FOLDER, codec_config(), dict(codec_tensors(codec)))
    write(folder / "generation_config.json", GENERATION)
    write(folder / "tokenizer_config.json", TOKENIZER)
    (folder / "tokenizer.json").write_bytes(spoken.tokenizer)
    (folder / "README.md").write_text(CARD)


def save(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    write(folder / "config.json", config)
    rounded = {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    save_file(rounded, folder / WEIGHTS, {"format": "pt"})


def write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


@torch.no_grad()
def read_talker(talker: Talker, folder: Path) -> None:
    """Fills it with what `publish` wrote."""
    found = load_file(folder / WEIGHTS)
    for name, part in talker_tensors(talker):
        part.copy_(found[name])


def talker_tensors(talker: Talker) -> Iterator[tuple[str, Tensor]]:
    predictor = "code_predictor."
    for name, tensor in unfused(talker):
        if name.startswith(f"{predictor}codec_embedding."):
            books = tensor.chunk(talker.code_predictor.config.num_codes)
            yield from ((f"talker.{predictor}model.codec_embedding.{i}.weight", book) for i, book in enumerate(books))
        elif name.startswith((f"{predictor}lm_head.", "codec_head.", "text_projection.")):
            yield f"talker.{name}", tensor
        elif name.startswith(predictor):
            yield f"talker.{predictor}model.{name.removeprefix(predictor).removeprefix('decoder.')}", tensor
        else:
            yield f"talker.model.{name.removeprefix('decoder.')}", tensor


def codec_tensors(codec: Codec) -> Iterator[tuple[str, Tensor]]:
    decoder = codec.decoder
    layers = dict(decoder.named_modules())
    for name, tensor in unfused(decoder):
        owner, _, kind = name.rpartition(".")
        if owner == "codebooks":
            continue
        is_convolution = isinstance(layers.get(owner), CausalConv | DepthwiseConv | TransposedConv)
        yield f"decoder.{owner}{'.conv' if is_convolution else ''}.{kind}", tensor
    books = decoder.codebooks
    yield f"decoder.{FIRST}output_proj.weight", books.first
    yield f"decoder.{REST}output_proj.weight", books.rest
    for book, rows in enumerate(codec.rows):
        prefix = f"decoder.{FIRST}vq.layers.0." if book == 0 else f"decoder.{REST}vq.layers.{book - 1}."
        yield f"{prefix}{SUMS}", rows
        yield f"{prefix}{USAGE}", torch.ones(len(rows))


def unfused(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters, of projections that stand in one matrix each by itself; each a view."""
    for name, tensor in model.named_parameters():
        owner, _, kind = name.rpartition(".")
        layer = model.get_submodule(owner)
        if isinstance(layer, MergedLinear):
            parent = owner.rpartition(".")[0]
            yield from ((f"{parent}.{part}.{kind}", tensor[layer.rows(part)]) for part in layer.parts)
        else:
            yield name, tensor
