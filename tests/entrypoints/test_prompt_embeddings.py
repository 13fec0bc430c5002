"""Stages that encode prompts, from a YAML to tensors, against `encode_prompt` of the pipelines that they are for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import Flux2KleinPipeline, QwenImagePipeline
from support.ar import make_model_folder, make_tokenizer
from support.language_models import TINY, save_random_model
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen3ForCausalLM

from vllm_omni import Omni

PROMPTS = ["a red circle left of a blue square", "", "你好 {name} {}", "the end of the world " * 100]
ROPE = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 1, 1]}
VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 32, "fullatt_block_indexes": [0]}


def embeddings(folder: Path, **stage: Any) -> list[Tensor]:
    """What a config of this one stage gives for all prompts at once."""
    text = {"kind": "ar", "model": str(folder / "text_encoder"), "task": "encode", "dtype": "float32", **stage}
    config = folder / "encode.yaml"
    config.write_text(yaml.safe_dump({"name": "encode", "stages": {"text": text}, "outputs": ["text.prompt_embeds"]}))
    with Omni(config=str(config), device="cpu") as omni:
        outs = omni.generate(PROMPTS)
    assert [out.error for out in outs] == [None] * len(PROMPTS)
    return [out.tensors["text.prompt_embeds"] for out in outs]


def published(kind: Any, encoder: Any) -> Any:
    parts = {"scheduler": None, "vae": None, "transformer": None}
    return kind(text_encoder=encoder.eval().requires_grad_(False), tokenizer=make_tokenizer(), **parts)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tokenizer stands beside the encoder, as diffusers writes it."""
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path


def test_flux2_kleins_embeddings(folder: Path) -> None:
    config = {"num_hidden_layers": 4, "max_position_embeddings": 1024, "scale": 0.1}
    make_model_folder(folder / "text_encoder", **config)
    ours = embeddings(
        folder,
        outputs={"prompt_embeds": {"layers": [1, 2, 3]}},
        chat_template_kwargs={"enable_thinking": False},
        pad_prompt_to=512,
        truncate_prompt=True,
    )
    pipeline = published(Flux2KleinPipeline, Qwen3ForCausalLM.from_pretrained(folder / "text_encoder"))
    for prompt, embeds in zip(PROMPTS, ours, strict=True):
        assert embeds.shape == (512, 96)
        assert_close(embeds, pipeline.encode_prompt(prompt, text_encoder_out_layers=(1, 2, 3))[0][0])


def test_qwen_images_embeddings(folder: Path) -> None:
    text = {**TINY, "rope_parameters": ROPE, "max_position_embeddings": 2048}
    config = Qwen2_5_VLConfig(text_config=text, vision_config={**VISION, "intermediate_size": 32})
    encoder = folder / "text_encoder"
    save_random_model(Qwen2_5_VLForConditionalGeneration, config, encoder)
    pipeline = published(QwenImagePipeline, Qwen2_5_VLForConditionalGeneration.from_pretrained(encoder))
    ours = embeddings(
        folder,
        outputs={"prompt_embeds": {"layers": [-1]}},
        prompt_template={"text": pipeline.prompt_template_encode, "drop_tokens": 34},
        max_prompt_tokens=1024,
        truncate_prompt=True,
    )
    for prompt, embeds in zip(PROMPTS, ours, strict=True):
        assert_close(embeds, pipeline.encode_prompt(prompt)[0][0])
