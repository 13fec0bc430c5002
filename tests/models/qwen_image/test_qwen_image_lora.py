"""Adapters of Qwen-Image: one batch of rows with several, one and no adapter, sizes and pictures to edit equals merged
weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_qwen_lora_to_diffusers
from PIL import Image
from support import dit
from support.lora import merged, random_lora
from support.qwen_image import random_pipeline, random_transformer

from vllm_omni import DiffusionParams, LoRA
from vllm_omni.config.schema import LoRAConfig
from vllm_omni.models.qwen_image import geometry

KINDS = {"words": ("QwenImagePipeline", {}), "edits": ("QwenImageEditPlusPipeline", {"zero_cond_t": True})}
MIXES: list[list[tuple[str, float]]] = [[], [("all", 1.0)], [("blocks", 0.7)], [("all", -0.5), ("blocks", 0.5)]]
STEPS = 2
SIZES = [(64, 64), (64, 64), (32, 96), (64, 96)]


def random_image(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8 + 4 * seed, 3), dtype=np.uint8)
    return Image.fromarray(pixels.repeat(8, 0).repeat(8, 1))


@pytest.fixture(autouse=True)
def small_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures to edit are so small that the tests are quick."""
    monkeypatch.setattr(geometry, "EDITED_AREA", 192 * 192)


@pytest.fixture(scope="module", params=KINDS)
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The plain checkpoint, its LoRA files, and a checkpoint for each mix with them merged."""
    root: Path = tmp_path_factory.mktemp(request.param)
    kind, options = KINDS[request.param]
    pipeline = random_pipeline(root / "plain", kind, **options)
    (root / "loras").mkdir()
    plain = pipeline.transformer
    loras = {
        "all": random_lora(plain, 1, std=0.1),
        "blocks": random_lora(plain, 2, rank=3, alpha=6.0, chosen=lambda name: "blocks" in name, std=0.1),
    }
    loras["all"].save(root / "loras" / "all.safetensors")
    loras["blocks"].save(root / "loras" / "blocks.safetensors", loras["blocks"].as_kohya())
    for index, mix in enumerate(MIXES):
        pipeline.transformer = merged(plain, [(loras[name], scale) for name, scale in mix])
        pipeline.save_pretrained(root / f"merged{index}")
    return {"plain": root / "plain", "loras": root / "loras", "root": root, "edits": request.param == "edits"}


def params(index: int, folders: dict[str, Any], *, is_adapted: bool) -> DiffusionParams:
    height, width = SIZES[index]
    return DiffusionParams(
        height=height,
        width=width,
        num_inference_steps=STEPS,
        guidance_scale=3.0 if index % 2 else 1.0,
        seed=index,
        image=random_image(index) if folders["edits"] else None,
        lora=[LoRA(name, scale=scale) for name, scale in MIXES[index]] if is_adapted else None,
    )


def submit(stage: Any, request_id: str, index: int, folders: dict[str, Any], *, is_adapted: bool) -> None:
    given = params(index, folders, is_adapted=is_adapted)
    stage.submit(dit.task(request_id, given, length=5 + 3 * index, seed=index))


def test_rows_of_every_mix_in_one_batch_equal_merged_weights(folders: dict[str, Any]) -> None:
    stage = dit.engine(folders["plain"], lora=LoRAConfig(folders=(str(folders["loras"]),)), max_batch_tokens=10**6)
    for _ in range(2):  # the second time all adapters are loaded, and every row is in one batch
        for index in range(len(MIXES)):
            submit(stage, f"r{index}", index, folders, is_adapted=True)
        found = dit.pictures(dit.run(stage))
    for index in range(len(MIXES)):
        alone = dit.engine(folders["root"] / f"merged{index}")
        submit(alone, "r", index, folders, is_adapted=False)
        expected = dit.pictures(dit.run(alone))["r"]
        assert (found[f"r{index}"].int() - expected.int()).abs().max() <= 2, MIXES[index]
    plain = dit.engine(folders["plain"])
    submit(plain, "r", 1, folders, is_adapted=False)
    difference = found["r1"].int() - dit.pictures(dit.run(plain))["r"].int()
    assert difference.abs().max() > 20, "an adapter that changes nothing would prove nothing"


def test_rows_with_different_adapters_share_every_pass(
    folders: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But where a reference rests at time zero for all rows together, and adapters touch what modulates it."""
    stage = dit.engine(folders["plain"], lora=LoRAConfig(folders=(str(folders["loras"]),)), max_batch_tokens=10**6)
    for index in range(len(MIXES)):
        submit(stage, f"r{index}", index, folders, is_adapted=True)
    dit.run(stage)  # all adapters are loaded
    counts: list[int] = []
    embed = stage.model.embed

    def counted(latents: Any, timesteps: Any, conditions: Any) -> Any:
        counts.append(len(latents))
        return embed(latents, timesteps, conditions)

    monkeypatch.setattr(stage.model, "embed", counted)
    for index in range(len(MIXES)):
        submit(stage, f"r{index}", index, folders, is_adapted=True)
    dit.run(stage)
    num_rows = STEPS * (1 + 2 + 1 + 2)
    assert (sum(counts) > num_rows) == folders["edits"] and sum(counts) >= num_rows


def test_the_file_of_kohyas_scripts_means_what_diffusers_makes_of_it() -> None:
    lora = random_lora(random_transformer(), 2, alpha=6.0, chosen=lambda name: "blocks" in name)
    converted = _convert_non_diffusers_qwen_lora_to_diffusers(dict(lora.as_kohya()))
    for name, (down, up, _) in lora.layers.items():
        torch.testing.assert_close(
            converted[f"transformer.{name}.lora_B.weight"] @ converted[f"transformer.{name}.lora_A.weight"],
            6.0 / len(down) * up @ down,
        )
