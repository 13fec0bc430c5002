"""Adapters of Wan: one batch of rows with several, one and no adapter, sizes, lengths and first frames equals merged
weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.loaders import lora_conversion_utils as conversion
from PIL import Image
from support.dit import run
from support.lora import RandomLoRA, merged, random_lora
from support.wan import BOTH, engine, random_pipeline, random_transformer, spec, task

from vllm_omni import DiffusionParams, LoRA
from vllm_omni.config.schema import LoRAConfig
from vllm_omni.messages import StageDone
from vllm_omni.models.wan.config import WanConfig
from vllm_omni.models.wan.lora_names import lora_aliases

MIXES: list[list[tuple[str, float]]] = [[], [("all", 1.0)], [("blocks", 0.7)], [("all", -0.5), ("blocks", 0.5)]]
STEPS = 2
SHAPES = [(64, 64, 5), (64, 64, 5), (32, 64, 5), (64, 32, 1)]


def of_blocks(name: str) -> bool:
    return "blocks" in name


def as_original(lora: RandomLoRA) -> RandomLoRA:
    """By the names of Wan's own code."""
    config = WanConfig.from_dict(dict(random_transformer().config))
    names = {published: theirs for theirs, published in lora_aliases(config).items()}
    return RandomLoRA({names[name]: layer for name, layer in lora.layers.items()})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`plain`, its LoRA files, and a checkpoint for each mix with them merged."""
    root = tmp_path_factory.mktemp("wan")
    pipeline = random_pipeline(root / "plain")
    plain = pipeline.transformer
    (root / "loras").mkdir()
    loras = {
        "all": random_lora(plain, 1, std=0.1),
        "blocks": random_lora(plain, 2, rank=3, alpha=6.0, chosen=of_blocks, std=0.1),
    }
    loras["all"].save(root / "loras" / "all.safetensors")
    of_musubi = as_original(loras["blocks"]).as_kohya()
    loras["blocks"].save(root / "loras" / "blocks.safetensors", of_musubi)
    for index, mix in enumerate(MIXES):
        pipeline.transformer = merged(plain, [(loras[name], scale) for name, scale in mix])
        pipeline.save_pretrained(root / f"merged{index}")
    return root


def params(index: int, *, is_adapted: bool, continues: bool) -> DiffusionParams:
    height, width, num_frames = SHAPES[index]
    pixels = np.random.default_rng(index).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return DiffusionParams(
        height=height,
        width=width,
        num_frames=num_frames,
        num_inference_steps=STEPS,
        guidance_scale=3.0 if index % 2 else 1.0,
        seed=index,
        image=Image.fromarray(pixels).resize((80, 60)) if continues else None,
        lora=[LoRA(name, scale=scale) for name, scale in MIXES[index]] if is_adapted else None,
    )


def submit(stage: Any, index: int, *, is_adapted: bool, continues: bool = False) -> None:
    asked = task(f"r{index}", params(index, is_adapted=is_adapted, continues=continues), 5 + 3 * index, index)
    stage.spec.check(asked.request, asked.params, BOTH)
    stage.submit(asked)


def videos(stage: Any) -> dict[str, torch.Tensor]:
    events = run(stage)
    done = {key: event for key, event in events.items() if isinstance(event, StageDone)}
    assert len(done) == len(events), events
    return {key: event.payload.tensors["video"][0].int() for key, event in done.items()}


@pytest.fixture(scope="module")
def stage(folder: Path) -> Any:
    """With adapters, all of which are loaded."""
    loras = LoRAConfig(folders=(str(folder / "loras"),))
    made = engine(folder / "plain", lora=loras, max_batch_tokens=10**6)
    for index in (1, 2):
        submit(made, index, is_adapted=True)
    run(made)
    return made


def test_rows_of_every_mix_in_one_batch_equal_merged_weights(folder: Path, stage: Any) -> None:
    for index in range(len(MIXES)):
        submit(stage, index, is_adapted=True, continues=index > 1)
    found = videos(stage)
    for index in range(len(MIXES)):
        alone = engine(folder / f"merged{index}")
        submit(alone, index, is_adapted=False, continues=index > 1)
        assert (found[f"r{index}"] - videos(alone)[f"r{index}"]).abs().max() <= 2, MIXES[index]
    plain = engine(folder / "plain")
    submit(plain, 1, is_adapted=False)
    assert (found["r1"] - videos(plain)["r1"]).abs().max() > 20, "an adapter that changes nothing would prove nothing"


@pytest.mark.parametrize("continues", [False, True])
def test_rows_with_different_adapters_share_every_pass(
    stage: Any, monkeypatch: pytest.MonkeyPatch, continues: bool
) -> None:
    """But where a first frame rests at timestep 0 for all rows together, and adapters touch what modulates it."""
    counts: list[int] = []
    embed = stage.model.embed

    def counted(latents: Any, timesteps: Any, conditions: Any) -> Any:
        counts.append(len(latents))
        return embed(latents, timesteps, conditions)

    monkeypatch.setattr(stage.model, "embed", counted)
    for index in range(len(MIXES)):
        submit(stage, index, is_adapted=True, continues=continues)
    run(stage)
    num_rows = STEPS * (1 + 2 + 1 + 2)
    assert (sum(counts) > num_rows) == continues and sum(counts) >= num_rows


@pytest.mark.parametrize(
    ("chosen", "alpha", "prefix", "convert"),
    [
        (lambda name: True, None, "diffusion_model.", conversion._convert_non_diffusers_wan_lora_to_diffusers),
        (of_blocks, 6.0, "diffusion_model.", conversion._convert_non_diffusers_wan_lora_to_diffusers),
        (of_blocks, 6.0, "lora_unet_", conversion._convert_musubi_wan_lora_to_diffusers),
    ],
)
def test_names_of_wans_own_code_mean_what_diffusers_makes_of_them(
    chosen: Any, alpha: float | None, prefix: str, convert: Any
) -> None:
    lora = random_lora(random_transformer(), 2, alpha=alpha, chosen=chosen)
    theirs = as_original(lora)
    tensors = theirs.as_kohya() if prefix == "lora_unet_" else theirs.as_peft(prefix)
    converted = convert({name: tensor.clone() for name, tensor in tensors.items()})  # it scales them in place
    assert len(converted) == 2 * len(lora.layers)
    for name, (down, up, _) in lora.layers.items():
        torch.testing.assert_close(
            converted[f"transformer.{name}.lora_B.weight"] @ converted[f"transformer.{name}.lora_A.weight"],
            (1.0 if alpha is None else alpha / len(down)) * up @ down,
        )


def test_files_of_every_naming_fit_the_same_layers(folder: Path, tmp_path: Path) -> None:
    lora = random_lora(random_transformer(), 2)
    theirs = as_original(lora)
    files = {
        "published": lora.as_peft(),
        "flat": lora.as_kohya(),
        "original": theirs.as_peft("diffusion_model."),
        "musubi": theirs.as_kohya(),
    }
    for name, tensors in files.items():
        lora.save(tmp_path / f"{name}.safetensors", tensors)
    source = spec(folder / "plain", lora=LoRAConfig(folders=(str(tmp_path),))).lora
    assert source is not None
    places = [{repr(piece.place) for piece in source.plans([LoRA(name)])[0].pieces} for name in files]
    assert all(each == places[0] for each in places) and len(places[0]) == len(lora.layers)
