"""The whole way from words to pixels with the shipped config, against diffusers' QwenImagePipeline on the same folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline
from support.ar import make_tokenizer
from support.language_models import TINY
from support.qwen_image import SCHEDULER, random_transformer, random_vae
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from vllm_omni import DiffusionParams, Omni

ROPE = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 1, 1]}
VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 32, "fullatt_block_indexes": [0]}
# Prompt, negative prompt, height, width, guidance, steps. The fourth is cut at the 512 tokens that the pipeline keeps.
CASES = [
    ("a red circle left of a blue square", "", 64, 64, 4.0, 3),
    ("日本の夜、ネオン — café {} 🌈", "blurry", 32, 96, 2.5, 4),
    ("", None, 48, 64, 1.0, 2),
    ("the end of the world " * 300, None, 96, 32, 1.0, 3),
]


def random_checkpoint(folder: Path) -> QwenImagePipeline:
    """With every part, as diffusers writes it."""
    torch.manual_seed(0)
    text = {**TINY, "rope_parameters": ROPE, "max_position_embeddings": 2048}
    config = Qwen2_5_VLConfig(text_config=text, vision_config={**VISION, "intermediate_size": 32})
    pipeline = QwenImagePipeline(
        FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        random_vae(),
        Qwen2_5_VLForConditionalGeneration(config).eval().requires_grad_(False),
        make_tokenizer(),
        random_transformer(joint_attention_dim=TINY["hidden_size"]),
    )
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_pictures_of_one_batch_equal_the_reference_pipeline(tmp_path: Path) -> None:
    pipeline = random_checkpoint(tmp_path)
    params = [
        DiffusionParams(
            height=height,
            width=width,
            guidance_scale=guidance,
            num_inference_steps=steps,
            seed=seed,
            negative_prompt=negative,
        )
        for seed, (_, negative, height, width, guidance, steps) in enumerate(CASES)
    ]
    with Omni(model=str(tmp_path), device="cpu", dtype="float32", progress=False) as omni:
        outputs = omni.generate([case[0] for case in CASES], params)
    for seed, (output, (prompt, negative, height, width, guidance, steps)) in enumerate(
        zip(outputs, CASES, strict=True)
    ):
        assert output.error is None, output.error
        expected = pipeline(
            prompt=prompt,
            negative_prompt=negative,
            true_cfg_scale=guidance,
            height=height,
            width=width,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        picture = np.asarray(expected).astype(int)
        assert np.abs(np.asarray(output.images[0]).astype(int) - picture).max() <= 2, prompt[:40]
        assert picture.std() > 10, "a flat picture would prove nothing"
