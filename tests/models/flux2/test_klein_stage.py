"""FLUX.2 [klein] stages: what a request may ask, what is computed once, step caches, previews, dtypes, memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.dit import BOTH, engine, pictures, run, spec
from support.flux2 import TEXT_WIDTH, picture, random_pipeline, task

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.config.shipped import config_for_model
from vllm_omni.core.diffusion.dit_cache_manager import DiTCacheManager
from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.messages import StageDone, StageProgress
from vllm_omni.models.flux2.pipeline import KleinPipeline
from vllm_omni.models.flux2.spec import KleinSpec
from vllm_omni.models.flux2.transformer import Condition
from vllm_omni.params import DiffusionParams
from vllm_omni.request import OmniRequest
from vllm_omni.worker.diffusion.encoded_images import EncodedImages

NO_CACHE = EncodedImages(DiTCacheManager(max_bytes=0), LimitsConfig())
CLASSES = ("Flux2KleinPipeline", "Flux2KleinKVPipeline", "Flux2KleinInpaintPipeline")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and a distilled checkpoint, one that keeps references, one that inpaints."""
    root = tmp_path_factory.mktemp("klein")
    random_pipeline(root / "base")
    random_pipeline(root / "distilled", is_distilled=True)
    random_pipeline(root / "kv", keeps_references=True)
    random_pipeline(root / "inpaint")
    index = root / "inpaint" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "Flux2KleinInpaintPipeline"}))
    return {path.name: path for path in root.iterdir()}


def check(folder: Path, request: dict[str, Any] | None = None, **params: Any) -> None:
    stage = spec(folder)
    given = OmniRequest(prompt="words", request_id="x", **(request or {}))
    stage.check(given, DiffusionParams(**{**stage.defaults, **params}), BOTH)


SIDES = {"height": 64, "width": 64}
PICTURE = picture(64, 96, 0)


@pytest.mark.parametrize(
    "name, params, says",
    [
        ("base", {"height": 60, "width": 64}, "height: got 60, expected a multiple of 16"),
        ("base", {"height": 8192, "width": 8192}, "height \\* width"),
        ("base", {**SIDES, "guidance_scale": -1.0}, "guidance_scale: got -1"),
        ("base", {**SIDES, "guidance_scale": 1.0, "negative_prompt": "fog"}, "raise guidance_scale above 1"),
        ("base", {**SIDES, "duration_s": 3.0}, "duration_s: FLUX.2 does not read it"),
        ("base", {**SIDES, "extra": {"cfg_normalization": 1}}, "extra.cfg_normalization: unknown key"),
        ("base", {"image": PICTURE, "mask": PICTURE, "height": 128}, "height: got 128, expected 64, which the image"),
        ("base", {"image": PICTURE, "mask": PICTURE, "strength": 0.0}, "strength: got 0.0, which leaves none of 50"),
        ("distilled", {**SIDES, "guidance_scale": 4.0}, "this checkpoint is distilled and never reads it"),
        ("distilled", {**SIDES, "negative_prompt": "fog"}, "negative_prompt: guidance_scale 1 never reads it"),
        ("kv", {**SIDES, "guidance_scale": 4.0}, "this checkpoint is distilled and never reads it"),
        ("kv", {"image": PICTURE, "mask": PICTURE}, "mask: this pipeline draws after references"),
        ("inpaint", SIDES, "image: missing; this pipeline draws an image anew where a mask says so"),
        ("inpaint", {"image": PICTURE}, "mask: missing"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(
    folders: dict[str, Path], name: str, params: dict[str, Any], says: str
) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        check(folders[name], **params)


def test_what_can_be_drawn_is_not_refused(folders: dict[str, Path]) -> None:
    check(folders["base"], {"negative_prompt": "fog"}, **SIDES)
    check(folders["base"], image=[PICTURE] * 4)
    check(folders["base"], {"fields": {"image": PICTURE, "mask": PICTURE, "strength": 0.3}})
    check(folders["distilled"], image=PICTURE, guidance_scale=0.0)
    check(folders["kv"], image=[PICTURE, PICTURE])
    check(folders["inpaint"], image=PICTURE, mask=PICTURE)


@pytest.mark.parametrize(
    "name, steps, says",
    [
        ("base", 50, "FLUX.2 [klein] base (by its model_index.json, is_distilled false)"),
        ("distilled", 4, "FLUX.2 [klein] distilled (by its model_index.json, is_distilled true)"),
        ("kv", 4, "distilled (as all Flux2KleinKVPipeline are), keeps keys and values of references"),
    ],
)
def test_a_checkpoint_says_whether_it_is_distilled(folders: dict[str, Path], name: str, steps: int, says: str) -> None:
    stage = spec(folders[name])
    assert says in stage.note()
    assert stage.defaults["num_inference_steps"] == steps
    needed = stage.needed_inputs(OmniRequest(prompt="words", request_id="x"), DiffusionParams(**stage.defaults))
    assert ("negative_prompt_embeds" in needed) == (name == "base")


@pytest.mark.parametrize("class_name", CLASSES)
def test_the_shipped_config_is_found_by_the_pipelines_name(tmp_path: Path, class_name: str) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": class_name}))
    assert config_for_model(tmp_path).name == "flux2_klein.yaml"


@pytest.mark.parametrize(
    "file, key, value",
    [
        ("model_index.json", "is_distilled", "yes"),
        ("vae/config.json", "latent_channels", 8),
        ("vae/config.json", "patch_size", [4, 4]),
        ("vae/config.json", "block_out_channels", []),
        ("scheduler/scheduler_config.json", "shift", float("nan")),
    ],
)
def test_a_folder_whose_parts_do_not_fit_is_refused(tmp_path: Path, file: str, key: str, value: object) -> None:
    random_pipeline(tmp_path)
    path = tmp_path / file
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ConfigError, match=key):
        KleinSpec(tmp_path)


def given(key: str, **more: Any) -> Any:
    params = {"num_inference_steps": 3, "guidance_scale": 1.0, "seed": 5, "height": 64, "width": 64}
    return task(key, DiffusionParams(**{**params, **more}))


def test_a_picture_is_encoded_once_for_all_requests_that_bring_it(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = engine(folders["base"])
    assert isinstance(stage.model, KleinPipeline)
    asked, encode = [], stage.model.vae.encode
    monkeypatch.setattr(stage.model.vae, "encode", lambda pixels: asked.append(pixels.shape) or encode(pixels))
    first, second = picture(64, 96, 0), picture(64, 64, 1)
    for key, image in {"a": first, "b": [second, first], "c": [first, first]}.items():
        stage.submit(given(key, image=image))
    assert len(pictures(run(stage))) == 3
    assert asked == [(1, 3, 64, 96), (1, 3, 64, 64)]


def test_outputs_of_one_request_share_what_its_references_left_behind(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = engine(folders["kv"])
    assert isinstance(stage.model, KleinPipeline)
    transformer = stage.model.transformer
    found, remember = [], transformer.remember
    monkeypatch.setattr(transformer, "remember", lambda references: found.append(remember(references)) or found[-1])
    stage.submit(given("a", image=[picture(64, 96, 0), picture(64, 64, 1)], num_outputs=3))
    drawn = pictures(run(stage))["a"]
    assert len(drawn) == 3 and not torch.equal(drawn[0], drawn[1])
    assert [tuple(kept.shape) for kept in found] == [(5, 2, 2, 4 * 6 + 4 * 4, 32)]


def test_what_a_trajectory_holds_is_counted(folders: dict[str, Path]) -> None:
    """References that are computed as their tokens, those that are kept as the activations that fill as much."""
    params = given("a", image=[picture(64, 96, 0), picture(128, 128, 1)])
    own, of_references = 16 + 7, 4 * 6 + 8 * 8
    trajectories = {}
    for name in ("base", "kv"):
        stage = engine(folders[name])
        prepared = stage.model.prepare(params.inputs, params.params, 5, NO_CACHE)
        trajectories[name] = stage.model.trajectory(prepared, params.params)
        token_bytes = stage.spec.model.token_bytes(torch.float32)
    assert trajectories["base"].num_tokens == own + of_references
    held = trajectories["kv"].conditions["positive"].remembered.nbytes
    assert 0 <= held - (trajectories["kv"].num_tokens - own) * token_bytes < token_bytes
    assert held > 10 * token_bytes


@pytest.mark.parametrize("name", ["base", "kv"])
@pytest.mark.parametrize("cache", [{"policy": "first_block", "threshold": 5.0}, {"policy": "taylorseer"}])
def test_step_caches_reuse_steps_whoever_else_is_drawn(
    folders: dict[str, Path], name: str, cache: dict[str, Any]
) -> None:
    crowd = {
        "plain": dict(num_inference_steps=8),
        "edit": dict(num_inference_steps=10, image=[picture(64, 96, 0), picture(64, 64, 1)], width=96),
        "other": dict(num_inference_steps=7, image=picture(64, 64, 1), seed=7),
    }
    alone, hits = {}, 0
    for key, more in crowd.items():
        stage = engine(folders[name], cache=cache)
        stage.submit(given(key, **more))
        event = run(stage)[key]
        assert isinstance(event, StageDone), event
        alone[key], hits = event, hits + event.metrics["cache_hits"]
    assert hits > 0
    stage = engine(folders[name], cache=cache)
    for key in reversed(crowd):
        stage.submit(given(key, **crowd[key]))
    for key, event in run(stage).items():
        assert isinstance(event, StageDone) and event.metrics == alone[key].metrics
        difference = event.payload.tensors["image"].int() - alone[key].payload.tensors["image"].int()
        assert difference.abs().max() <= 1, key


def test_a_preview_is_the_picture_that_this_step_leads_to(folders: dict[str, Path]) -> None:
    stage = engine(folders["base"])
    stage.submit(given("a", num_inference_steps=4, num_previews=2, image=picture(64, 64, 0), width=96))
    shown, done = [], None
    while done is None:
        for event in stage.step():
            if isinstance(event, StageProgress) and event.previews is not None:
                shown.append(event.previews[0])
            done = event if isinstance(event, StageDone) else done
    image, latents = done.payload.tensors["image"][0], done.payload.tensors["latents"][0]
    assert len(shown) == 2 and all(preview.shape == image.shape for preview in shown)
    assert (stage.model.preview(latents).int() - image.int()).abs().max() <= 1
    assert all((preview.int() - image.int()).abs().max() > 10 for preview in shown)
    prepared = stage.model.prepare(given("b").inputs, given("b").params, 5, NO_CACHE)
    trajectory = stage.model.trajectory(prepared, given("b").params)
    noise, velocity, last = torch.randn(16, 4, 4), torch.randn(16, 4, 4), len(trajectory.timesteps) - 1
    trajectory.sampler.set_begin_index(last)
    stepped = trajectory.sampler.step(velocity[None], trajectory.timesteps[last], noise[None], return_dict=False)
    assert torch.allclose(trajectory.estimate(noise, velocity, last), stepped[0][0], atol=1e-5)


@pytest.mark.parametrize("quantization, tolerance", [(None, 0.05), ("int8", 0.1)])
@torch.no_grad()
def test_bfloat16_and_int8_are_near_float32(
    folders: dict[str, Path], quantization: str | None, tolerance: float
) -> None:
    """With the kernels of inference; references that have no text beside them included."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        chosen = quantization if dtype == torch.bfloat16 else None
        model = KleinSpec(folders["base"]).load(torch.device("cpu"), dtype, chosen).transformer
        sources = [model.embed_reference(torch.randn(16, *grid)) for grid in ((3, 2), (2, 5))]
        latents = [torch.randn(16, 4, 6) for _ in range(3)]
        text = model.embed_text(torch.randn(9, TEXT_WIDTH))
        conditions = [Condition(text), Condition(text, tuple(sources)), Condition(text, (), model.remember(sources))]
        velocities = model(latents, torch.tensor([900.0, 500.0, 100.0]), conditions)
        found[dtype] = torch.stack(velocities).float()
    difference = found[torch.bfloat16] - found[torch.float32]
    assert 0 < difference.std() < tolerance * found[torch.float32].std()
