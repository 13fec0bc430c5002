"""Tiny random Qwen2.5-VL checkpoints in the published format, and transformers' processor and model to compare with."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from support.media import AnyParts, FramesOneByOne
from support.speech import character_tokenizer
from torch import Tensor
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import is_torchvision_available

IMAGE, VIDEO = 101, 102
WORDS = {
    "<|im_start|>": 96,
    "<|im_end|>": 97,
    "<|endoftext|>": 98,
    "<|image_pad|>": IMAGE,
    "<|video_pad|>": VIDEO,
    "<|vision_start|>": 106,
    "<|vision_end|>": 107,
}
TEXT = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    "bos_token_id": None,
    "eos_token_id": 97,
}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "window_size": 32,
    "out_hidden_size": 32,
    "fullatt_block_indexes": [1],
    "tokens_per_second": 2,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tiny_vl(folder: Path, seed: int = 0, patch_size: int = 4, processor: str = ".", **text: Any) -> Path:
    """Weights, config.json, a tokenizer (one token a character) and, in the folder `processor`, the settings of
    pictures. A token is 2 x 2 patches.
    """
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, **text},
        vision_config={**VISION, "patch_size": patch_size, "window_size": 8 * patch_size},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=106,
        vision_end_token_id=107,
    )
    tiny_vl(config, seed).save_pretrained(folder)
    settings = (folder / processor).resolve()
    settings.mkdir(exist_ok=True, parents=True)
    save_vl_processor(settings, patch_size)
    if settings != folder.resolve():
        tokenizer().save_pretrained(folder)
    return folder


def tiny_vl(config: Qwen2_5_VLConfig, seed: int = 0) -> Any:
    """transformers' model, weights large enough that different inputs give different tokens."""
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape) * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(torch.randn(parameter.shape) * 0.1 + (0.0 if name.endswith("bias") else 1.0))
    return model


def tokenizer() -> Any:
    return character_tokenizer(
        WORDS, extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    )


def save_vl_processor(folder: Path, patch_size: int) -> Path:
    """Tokenizer, chat template and the settings of pictures, whose size may be of 1 to 2048 tokens."""
    tokenizer().save_pretrained(folder)
    factor = 2 * patch_size
    settings = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "image_mean": [0.48, 0.46, 0.41],
        "image_std": [0.27, 0.26, 0.28],
        "min_pixels": factor**2,
        "max_pixels": 2048 * factor**2,
        "patch_size": patch_size,
        "merge_size": 2,
        "temporal_patch_size": 2,
    }
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


class FramesWithTheirRate(FramesOneByOne):
    """Frames as they are, two a second."""

    def __call__(self, videos: list[Any], **_: Any) -> dict[str, Any]:
        images = self._images
        made = super().__call__(videos, {"shortest_edge": images.size["shortest_edge"], "longest_edge": 10**6})
        return {**made, "video_metadata": [SimpleNamespace(sampled_fps=2.0) for _ in videos]}


class ProcessorWithoutTorchvision(AnyParts, Qwen2_5_VLProcessor):
    """The library's class and call."""


def vl_processor(folder: Path) -> Any:
    """transformers' processor of the folder; without torchvision put together from the parts that run without it."""
    if is_torchvision_available():
        return AutoProcessor.from_pretrained(folder)
    images = Qwen2VLImageProcessorPil.from_pretrained(folder)
    return ProcessorWithoutTorchvision(images, AutoTokenizer.from_pretrained(folder), FramesWithTheirRate(images))


def user(*parts: Any) -> list[dict[str, Any]]:
    """One message: strings are text, arrays of four axes videos (two frames a second), others pictures."""
    content = []
    for part in parts:
        kind = "text" if isinstance(part, str) else "video" if getattr(part, "ndim", 3) == 4 else "image"
        content.append({"type": kind, kind: part})
    return [{"role": "user", "content": content}]


class Reference:
    """transformers' own model and processor of a folder."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()
        self.processor = vl_processor(folder)

    def inputs(self, messages: list[dict[str, Any]]) -> dict[str, Tensor]:
        """What its processor makes of messages; videos with positions of two frames a second."""
        text = self.processor.tokenizer.apply_chat_template(
            messages, chat_template=CHAT_TEMPLATE, tokenize=False, add_generation_prompt=True
        )
        parts = [part for message in messages for part in message["content"]]
        media = {
            f"{kind}s": [part[kind] for part in parts if part["type"] == kind]
            for kind in ("image", "video")
            if any(part["type"] == kind for part in parts)
        }
        return dict(self.processor(text=[text], return_tensors="pt", return_mm_token_type_ids=True, **media))

    def write(self, messages: list[dict[str, Any]], num_tokens: int) -> tuple[list[int], Tensor]:
        """Greedy tokens, and the states [T, (layers) * D] of the prompt behind every layer."""
        inputs = self.inputs(messages)
        with torch.no_grad():
            states = self.model(**inputs, output_hidden_states=True).hidden_states
            self.model.model.rope_deltas = None
            written = self.model.generate(
                **inputs, max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=98
            )
        self.model.model.rope_deltas = None
        prompt_length = inputs["input_ids"].shape[1]
        return written[0, prompt_length:].tolist(), torch.cat([state[0] for state in states[1:]], dim=-1)
