"""Adapters of Z-Image: one batch of rows with several, one and no adapter equals diffusers with merged weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImagePipeline
from safetensors.torch import load_file
from support import dit
from support.lora import RandomLoRA, merged, random_lora

from vllm_omni import DiffusionParams, LoRA
from vllm_omni.config.schema import LoRAConfig
from vllm_omni.engine.base import Activity
from vllm_omni.engine.diffusion.engine import DiffusionEngine
from vllm_omni.messages import StageDone
from vllm_omni.models.z_image.packing import Tokens

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
    made["attention"].save(folder / "attention.safetensors", made["attention"].as_peft(""))
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
            assert (expected.int() - plain.int()).abs().max() > 20, (
                "an adapter that changes nothing would prove nothing"
            )


def submit(stage: DiffusionEngine, indices: Sequence[int] = range(len(MIXES)), guidance: float = 0.0) -> None:
    for index in indices:
        stage.submit(dit.task(f"r{index}", params(index, guidance), seed=index))


def adapted_engine(pipeline: ZImagePipeline, max_memory_mb: float = 512.0, **options: Any) -> DiffusionEngine:
    config = LoRAConfig(folders=(str(pipeline.loras),), max_memory_mb=max_memory_mb)
    return dit.engine(pipeline.folder, lora=config, **options)


@pytest.mark.usefixtures("loras")
class TestEngine:
    def test_alone_equals_in_a_crowd(self, pipeline: ZImagePipeline) -> None:
        crowd = adapted_engine(pipeline)
        submit(crowd)
        together = dit.pictures(dit.run(crowd))
        for index in range(len(MIXES)):
            stage = adapted_engine(pipeline)
            submit(stage, [index])
            alone = dit.pictures(dit.run(stage))[f"r{index}"]
            assert (alone.int() - together[f"r{index}"].int()).abs().max() <= 1

    def test_rows_with_different_adapters_share_every_pass(
        self, pipeline: ZImagePipeline, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stage = adapted_engine(pipeline)
        submit(stage)
        dit.run(stage)
        submit(stage)  # whose adapters are loaded
        counts: list[int] = []
        embed = stage.model.embed

        def counted(latents: Any, timesteps: Any, conditions: Any) -> Any:
            counts.append(len(latents))
            return embed(latents, timesteps, conditions)

        monkeypatch.setattr(stage.model, "embed", counted)
        dit.run(stage)
        assert max(counts) == len(MIXES)
        assert sum(counts) == STEPS * len(MIXES), "no pass was tried in vain"

    def test_a_model_that_does_not_say_how_it_packs_gives_the_same(
        self, pipeline: ZImagePipeline, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        known = adapted_engine(pipeline)
        submit(known)
        expected = dit.pictures(dit.run(known))
        monkeypatch.setattr(Tokens, "packings", property(lambda self: ()))
        stage = adapted_engine(pipeline)
        submit(stage)
        for request_id, picture in dit.pictures(dit.run(stage)).items():
            assert (picture.int() - expected[request_id].int()).abs().max() <= 1

    @pytest.mark.parametrize("policy", [{"policy": "first_block", "threshold": 0.3}, {"policy": "taylorseer"}])
    def test_step_caches_keep_apart_what_adapters_make(self, pipeline: ZImagePipeline, policy: dict[str, Any]) -> None:
        crowd = adapted_engine(pipeline, cache=policy)
        submit(crowd)
        together = dit.pictures(dit.run(crowd))
        for index in (1, 2):
            stage = adapted_engine(pipeline, cache=policy)
            submit(stage, [index])
            alone = dit.pictures(dit.run(stage))[f"r{index}"]
            assert (alone.int() - together[f"r{index}"].int()).abs().max() <= 1

    def test_requests_wait_for_room_in_their_order_and_others_pass(self, pipeline: ZImagePipeline) -> None:
        sizes = {name: bytes_of(pipeline, name) for name in ("everything", "attention", "kohya", "comfy")}
        stage = adapted_engine(pipeline, max_memory_mb=(sizes["everything"] + sizes["comfy"]) / 2**20)
        submit(stage, [5, 2, 3, 0])  # the second finds no room, and the third waits behind it
        order: list[str] = []
        while stage.activity() is Activity.BUSY:
            order += [event.request_id for event in stage.step() if isinstance(event, StageDone)]
            stage.check_integrity()
        assert sorted(order) == ["r0", "r2", "r3", "r5"] and order.index("r5") < order.index("r2")
        assert order.index("r0") < order.index("r2")
        assert stage.get_stats()["lora_owners"] == 0 and stage.get_stats()["lora_evictions"] > 0

    def test_aborts_leave_nothing(self, pipeline: ZImagePipeline) -> None:
        stage = adapted_engine(pipeline)
        submit(stage)
        for num_steps in range(len(MIXES)):
            stage.step()
            stage.abort(f"r{num_steps}")
            stage.check_integrity()
        assert dit.run(stage) == {}
        stats = stage.get_stats()
        assert stats["running"] == stats["lora_owners"] == 0
        assert stage.activity() is Activity.IDLE


def bytes_of(pipeline: ZImagePipeline, name: str) -> int:
    """Of its numbers in float32, alphas apart."""
    tensors = load_file(pipeline.loras / f"{name}.safetensors")
    return sum(tensor.numel() * 4 for key, tensor in tensors.items() if not key.endswith("alpha"))


@pytest.mark.parametrize("index", [1, 2, 5])
def test_pictures_equal_those_of_load_lora_weights(
    pipeline: ZImagePipeline, loras: dict[str, RandomLoRA], index: int
) -> None:
    pytest.importorskip("peft", reason="diffusers loads LoRA with peft alone")
    folder = Path(str(pipeline.loras))
    other = ZImagePipeline.from_pretrained(pipeline.folder, tokenizer=None, text_encoder=None)
    other.set_progress_bar_config(disable=True)
    for name, _ in MIXES[index]:
        other.load_lora_weights(str(folder), weight_name=f"{name}.safetensors", adapter_name=name)
    other.set_adapters([name for name, _ in MIXES[index]], adapter_weights=[scale for _, scale in MIXES[index]])
    other.folder, other.loras = pipeline.folder, folder
    height, width = SIZES[index]
    images = other(
        prompt_embeds=[dit.states(7, index)],
        height=height,
        width=width,
        num_inference_steps=STEPS,
        guidance_scale=0.0,
        generator=torch.Generator().manual_seed(index),
        output_type="np",
    ).images
    stage = adapted_engine(pipeline)
    submit(stage)
    found = dit.pictures(dit.run(stage))[f"r{index}"][0]
    expected = (torch.from_numpy(images[0]) * 255).round().byte()
    assert (found.int() - expected.int()).abs().max() <= 2
