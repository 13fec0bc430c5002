"""The whole way from words and pictures to pixels with the shipped configs, against diffusers' pipelines on the same
folders.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from PIL import Image
from support.media import picture
from support.qwen_image import SCHEDULER, random_transformer, random_vae, whole_pipeline
from support.seeing import IMAGE, TEXT, save_tiny_vl, vl_processor
from transformers import Qwen2_5_VLForConditionalGeneration

from vllm_omni import DiffusionParams, Omni, OmniOutput
from vllm_omni.models.qwen_image import geometry

# Prompt, negative prompt, height, width, guidance, steps. The fourth is cut at the 512 tokens that the pipeline keeps.
CASES = [
    ("a red circle left of a blue square", "", 64, 64, 4.0, 3),
    ("日本の夜、ネオン — café {} 🌈", "blurry", 32, 96, 2.5, 4),
    ("", None, 48, 64, 1.0, 2),
    ("the end of the world " * 300, None, 96, 32, 1.0, 3),
]


def assert_equal(output: OmniOutput, expected: Image.Image) -> None:
    assert output.error is None, output.error
    got, picture = (np.asarray(image).astype(int) for image in (output.images[0], expected))
    assert got.shape == picture.shape and np.abs(got - picture).max() <= 2
    assert picture.std() > 10, "a flat picture would prove nothing"


def test_pictures_of_one_batch_equal_the_reference_pipeline(tmp_path: Path) -> None:
    pipeline = whole_pipeline(tmp_path)
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
    for seed, (prompt, negative, height, width, guidance, steps) in enumerate(CASES):
        expected = pipeline(
            prompt=prompt,
            negative_prompt=negative,
            true_cfg_scale=guidance,
            height=height,
            width=width,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        assert_equal(outputs[seed], expected)


SMALL_AREA = 192 * 192  # of pictures to edit, so that the test is quick
PICTURES = [Image.fromarray(picture(*size, seed)) for seed, size in enumerate([(90, 130), (64, 64), (300, 100)])]


def random_editor(folder: Path) -> QwenImageEditPlusPipeline:
    """With every part, as diffusers writes it. The pipeline does not tell its text encoder which tokens are pictures,
    which transformers 5 needs for the positions that the model was trained with (diffusers#14194): a hook does.
    """
    save_tiny_vl(folder / "text_encoder", patch_size=16, processor="../processor")
    encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder").eval()
    processor = vl_processor(folder / "processor")

    def with_kinds(_: Any, args: Any, keys: dict[str, Any]) -> Any:
        return args, {**keys, "mm_token_type_ids": (keys["input_ids"] == IMAGE).int()}

    encoder.register_forward_pre_hook(with_kinds, with_kwargs=True)
    pipeline = QwenImageEditPlusPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=random_vae(),
        text_encoder=encoder,
        tokenizer=processor.tokenizer,
        processor=processor,
        transformer=random_transformer(joint_attention_dim=TEXT["hidden_size"], zero_cond_t=True),
    )
    pipeline.set_progress_bar_config(disable=True)
    for part in ("scheduler", "vae", "transformer", "tokenizer"):
        pipeline.components[part].save_pretrained(folder / part)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "QwenImageEditPlusPipeline"}))
    return pipeline


def test_edits_of_one_batch_equal_the_reference_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "EDITED_AREA", SMALL_AREA)
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", SMALL_AREA)
    pipeline = random_editor(tmp_path)
    cases = [
        ("Make it red", "blurry", PICTURES[:1], 4.0),
        ("Join {them}", None, PICTURES, 1.0),
        ("Turn", "", PICTURES[1:][::-1], 2.5),
    ]
    settings = {"height": 64, "width": 96, "num_inference_steps": 3}
    params = [
        DiffusionParams(image=pictures, negative_prompt=negative, guidance_scale=guidance, seed=seed, **settings)
        for seed, (_, negative, pictures, guidance) in enumerate(cases)
    ]
    words = DiffusionParams(guidance_scale=1.0, seed=9, **settings)
    with Omni(model=str(tmp_path), device="cpu", dtype="float32", progress=False) as omni:
        outputs = omni.generate([*(case[0] for case in cases), "A cat"], [*params, words])
    for seed, (prompt, negative, pictures, guidance) in enumerate(cases):
        expected = pipeline(
            image=pictures,
            prompt=prompt,
            negative_prompt=negative,
            true_cfg_scale=guidance,
            generator=torch.Generator().manual_seed(seed),
            **settings,
        ).images[0]
        assert_equal(outputs[seed], expected)
    assert outputs[-1].error is None and outputs[-1].images[0].size == (96, 64), "pictures of words alone in the batch"
