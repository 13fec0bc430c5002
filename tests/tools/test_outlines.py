"""The LoRA that ships draws outlines, and its judge tells them from filled shapes."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from tools.tiny.image.evaluate_outlines import prompts
from tools.tiny.image.outlines import complaint, draw_outlines
from tools.tiny.image.render import draw_scene
from tools.tiny.image.train_outlines import main
from vllm_omni import DiffusionParams, LoRA, Omni


def test_the_judge_takes_drawn_outlines_for_right_and_filled_shapes_for_wrong() -> None:
    rng = random.Random(1)
    scenes = [scene for _, scene in prompts(40, seed=2)]
    assert sum(complaint(draw_outlines(scene, rng), scene) is None for scene in scenes) >= 38
    assert all(complaint(draw_scene(scene, rng), scene) for scene in scenes)


def test_a_batch_with_and_without_the_lora_holds_outlines_and_filled_shapes() -> None:
    asked = prompts(8, seed=777)
    words = [text for text, _ in asked]
    with Omni("tiny_image", progress=False) as omni:
        params = [DiffusionParams(seed=index, lora=lora) for lora in ([LoRA("outlines")], None) for index in range(8)]
        outputs = omni.generate(words * 2, params)
    pictures = [np.asarray(output.images[0]) for output in outputs]
    right = [complaint(picture, scene) is None for picture, (_, scene) in zip(pictures, asked * 2, strict=True)]
    assert sum(right[:8]) >= 5 and not any(right[8:])


def test_training_writes_what_diffusers_calls_a_lora(tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    main(["--pictures", "32", "--steps", "2", "--batch-size", "2", "-o", str(file)])
    names = set(load_file(file))
    assert "transformer.layers.0.attention.to_q.lora_A.weight" in names
    assert {name.replace("lora_A", "lora_B") for name in names} == {name for name in names if "lora_B" in name}
