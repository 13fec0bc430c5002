"""Adapters of Z-Image: one batch of rows with several, one and no adapter equals diffusers with merged weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import ZImagePipeline
from support import dit
from support.lora import RandomLoRA, merged, random_lora

from vllm_omni import DiffusionParams, LoRA
from vllm_omni.config.schema import LoRAConfig

STEPS = 3


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> ZImagePipeline:
    folder = tmp_path_factory.mktemp("z-image")
    made = dit.random_pipeline(folder)
    made.folder = folder
    return made


@pytest.fixture(scope="module")
def loras(pipeline: ZImagePipeline, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RandomLoRA]:
    """By name of the file, each in another naming; `folder` holds them."""
    model, folder = pipeline.transformer, tmp_path_factory.mktemp("loras")
    made = {
        "everything": random_lora(model, 1),
        "attention": random_lora(model, 2, rank=6, alpha=3.0, chosen=lambda name: ".attention." in name),
        "kohya": random_lora(model, 3, rank=2, alpha=4.0, chosen=lambda name: "layers." in name),
        "comfy": random_lora(model, 4, chosen=lambda name: "refiner" in name or "embedder" in name),
    }
    made["everything"].save(folder / "everything.safetensors")
    made["attention"].save(folder / "attention.safetensors")
    made["kohya"].save(folder / "kohya.safetensors", made["kohya"].as_kohya())
    made["comfy"].save(folder / "comfy.safetensors", made["comfy"].as_peft("diffusion_model."))
    pipeline.loras = folder
    return made


MIXES: list[list[tuple[str, float]]] = [
    [],
    [("everything", 1.0)],
    [("attention", 0.7), ("kohya", -0.5)],
    [("comfy", 1.5)],
    [("kohya", 1.0)],
    [("everything", 0.5), ("comfy", 0.5)],
]
SIZES = [(64, 64), (64, 64), (32, 96), (64, 48), (48, 48), (64, 64)]


def params(index: int, guidance: float, **more: object) -> DiffusionParams:
    height, width = SIZES[index]
    return DiffusionParams(
        height=height,
        width=width,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        seed=index,
        lora=[LoRA(name, scale=scale) for name, scale in MIXES[index]],
        **more,  # type: ignore[arg-type]
    )


def reference(pipeline: ZImagePipeline, loras: dict[str, RandomLoRA], index: int, guidance: float) -> torch.Tensor:
    """[H, W, 3] uint8 of diffusers with merged weights."""
    plain = pipeline.transformer
    pipeline.transformer = merged(plain, [(loras[name], scale) for name, scale in MIXES[index]])
    height, width = SIZES[index]
    try:
        images = pipeline(
            prompt_embeds=[dit.states(7, index)],
            negative_prompt_embeds=[dit.states(9, 1000)],
            height=height,
            width=width,
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(index),
            output_type="np",
        ).images
    finally:
        pipeline.transformer = plain
    return (torch.from_numpy(images[0]) * 255).round().byte()


@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_rows_of_every_mix_in_one_batch_equal_merged_weights(
    pipeline: ZImagePipeline, loras: dict[str, RandomLoRA], guidance: float
) -> None:
    stage = dit.engine(pipeline.folder, lora=LoRAConfig(folders=(str(pipeline.loras),)))
    for index in range(len(MIXES)):
        stage.submit(dit.task(f"r{index}", params(index, guidance), seed=index))
    found = dit.pictures(dit.run(stage))
    plain = reference(pipeline, loras, 0, guidance)
    for index in range(len(MIXES)):
        expected = reference(pipeline, loras, index, guidance)
        difference = (found[f"r{index}"][0].int() - expected.int()).abs().max()
        assert difference <= 2, (MIXES[index], int(difference))
        if SIZES[index] == SIZES[0] and index:
            assert (expected.int() - plain.int()).abs().max() > 20, "an adapter that changes nothing would prove nothing"
