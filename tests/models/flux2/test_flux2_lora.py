"""Adapters of FLUX.2: one batch of rows with several, one and no adapter, any sizes and references, is as if merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_kohya_flux2_lora_to_diffusers,
    _convert_non_diffusers_flux2_lora_to_diffusers,
)
from safetensors.torch import save_file
from support import dit
from support.flux2 import picture, random_pipeline, task
from support.lora import RandomLoRA, merged, random_lora
from torch import Tensor

from vllm_omni import DiffusionParams, LoRA
from vllm_omni.config.schema import LoRAConfig
from vllm_omni.layers.weights import tensor_shapes
from vllm_omni.models.flux2.lora_names import AROUND, DOUBLE, SINGLE
from vllm_omni.models.flux2.spec import KleinSpec
from vllm_omni.worker.lora.folders import LoRAFile
from vllm_omni.worker.lora.plan import LoRAPlan, plan_lora
from vllm_omni.worker.lora.target import LoRATarget

MIXES: list[list[tuple[str, float]]] = [[], [("all", 1.0)], [("blocks", 0.7)], [("all", -0.5), ("blocks", 0.5)]]
SIZES = [(64, 64), (64, 64), (32, 96), (64, 96)]
REFERENCES = [[], [(64, 64)], [], [(32, 64), (64, 32)]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The plain checkpoint, its LoRA files, and a checkpoint for each mix with them merged."""
    root = tmp_path_factory.mktemp("klein")
    pipeline = random_pipeline(root / "plain", is_distilled=True)
    (root / "loras").mkdir()
    loras: dict[str, RandomLoRA] = {
        "all": random_lora(pipeline.transformer, 1, std=0.1),
        "blocks": random_lora(
            pipeline.transformer, 2, rank=3, alpha=6.0, chosen=lambda name: "blocks" in name, std=0.1
        ),
    }
    loras["all"].save(root / "loras" / "all.safetensors")
    loras["blocks"].save(root / "loras" / "blocks.safetensors", loras["blocks"].as_kohya("lora_transformer_"))
    plain = pipeline.transformer
    for index, mix in enumerate(MIXES):
        pipeline.transformer = merged(plain, [(loras[name], scale) for name, scale in mix])
        pipeline.save_pretrained(root / f"merged{index}")
    return {"plain": root / "plain", "loras": root / "loras", "root": root}


def params(index: int, *, is_adapted: bool) -> DiffusionParams:
    height, width = SIZES[index]
    return DiffusionParams(
        height=height,
        width=width,
        num_inference_steps=3,
        seed=index,
        guidance_scale=1.0,
        image=[picture(*size, seed) for seed, size in enumerate(REFERENCES[index])] or None,
        lora=[LoRA(name, scale=scale) for name, scale in MIXES[index]] if is_adapted else None,
    )


def test_rows_of_every_mix_in_one_batch_equal_merged_weights(folders: dict[str, Any]) -> None:
    stage = dit.engine(folders["plain"], lora=LoRAConfig(folders=(str(folders["loras"]),)))
    for _ in range(2):  # the second time all adapters are loaded, and every row is in one batch
        for index in range(len(MIXES)):
            stage.submit(task(f"r{index}", params(index, is_adapted=True), length=5 + 3 * index, seed=index))
        found = dit.pictures(dit.run(stage))
    for index in range(len(MIXES)):
        alone = dit.engine(folders["root"] / f"merged{index}")
        alone.submit(task("r", params(index, is_adapted=False), length=5 + 3 * index, seed=index))
        expected = dit.pictures(dit.run(alone))["r"]
        assert (found[f"r{index}"].int() - expected.int()).abs().max() <= 2, MIXES[index]


def test_rows_with_different_adapters_share_every_pass(
    folders: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = dit.engine(folders["plain"], lora=LoRAConfig(folders=(str(folders["loras"]),)))
    counts: list[int] = []
    embed = stage.model.embed

    def counted(latents: Any, timesteps: Any, conditions: Any) -> Any:
        counts.append(len(latents))
        return embed(latents, timesteps, conditions)

    monkeypatch.setattr(stage.model, "embed", counted)
    for index in range(len(MIXES)):
        stage.submit(task(f"r{index}", params(index, is_adapted=True), length=5 + 3 * index, seed=index))
    dit.run(stage)
    assert sum(counts) == 3 * len(MIXES) and max(counts) > 2, "no pass was tried in vain"


def original_file(prefix: str, is_flat: bool) -> dict[str, Tensor]:
    """A LoRA of every layer by the names of the original code, two blocks of one kind and three of the other."""
    width, mlp, rank = 64, 64 * 3, 2
    inputs = {"img_mlp.2": mlp, "txt_mlp.2": mlp, "linear2": width + mlp, "img_in": 16, "txt_in": 48}
    inputs |= {"time_in.in_layer": 32}
    outputs = {"img_attn.qkv": 3 * width, "txt_attn.qkv": 3 * width, "linear1": 3 * width + 2 * mlp}
    outputs |= {"img_mlp.0": 2 * mlp, "txt_mlp.0": 2 * mlp, "final_layer.linear": 16}
    blocks = [(f"double_blocks.{index}.", name) for index in range(2) for name in DOUBLE]
    blocks += [(f"single_blocks.{index}.", name) for index in range(3) for name in SINGLE]
    around = [("", name) for name in AROUND if "modulation" not in name and "guidance" not in name]
    draw, tensors = torch.Generator().manual_seed(0), {}
    for where, name in [*blocks, *around]:
        layer = where + name
        layer = layer.replace(".", "_") if is_flat else layer
        down = torch.randn(rank, inputs.get(name, width), generator=draw)
        up = torch.randn(outputs.get(name, width), rank, generator=draw)
        tensors |= {f"{prefix}{layer}.lora_down.weight": down, f"{prefix}{layer}.lora_up.weight": up}
        if is_flat:
            tensors[f"{prefix}{layer}.alpha"] = torch.tensor(4.0)
    return tensors


def deltas(plan: LoRAPlan, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Layer of ours -> what the file adds to its weight."""
    found: dict[str, Tensor] = {}
    for piece in plan.pieces:
        place = piece.place
        delta = piece.factor * tensors[piece.up] @ tensors[piece.down]
        rows = max(place.columns.stop, len(found.get(place.layer, ())))
        grown = torch.zeros(rows, place.num_inputs)
        if place.layer in found:
            grown[: len(found[place.layer])] = found[place.layer]
        grown[place.columns] += delta
        found[place.layer] = grown
    return found


@pytest.mark.parametrize("is_flat", [False, True])
def test_names_of_the_original_code_mean_what_diffusers_makes_of_them(
    folders: dict[str, Any], tmp_path: Path, is_flat: bool
) -> None:
    spec = KleinSpec(folders["plain"])
    target = LoRATarget(spec.build_transformer(), tensor_shapes(folders["plain"] / "transformer"), spec.lora_aliases())
    tensors = original_file("lora_unet_" if is_flat else "diffusion_model.", is_flat)
    convert = _convert_kohya_flux2_lora_to_diffusers if is_flat else _convert_non_diffusers_flux2_lora_to_diffusers
    converted = {name: tensor.clone() for name, tensor in convert(dict(tensors)).items()}
    plans = []
    for name, content in (("original", tensors), ("converted", converted)):
        file = tmp_path / f"{name}.safetensors"
        save_file({key: tensor.clone() for key, tensor in content.items()}, file)
        plans.append(plan_lora(LoRAFile.of(file), target, 16))
    ours, theirs = deltas(plans[0], tensors), deltas(plans[1], converted)
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for layer, delta in ours.items():
        torch.testing.assert_close(delta, theirs[layer])
