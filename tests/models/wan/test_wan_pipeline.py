"""The native Wan stage against diffusers' pipelines, on random small weights in float32: videos of words and from a
first frame.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image
from support.dit import run
from support.wan import BOTH, change_index, engine, euler, random_pipeline, reference_states, spec, task

from vllm_omni.engine.diffusion.engine import DiffusionEngine
from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.messages import StageDone, StageEvent, StageProgress
from vllm_omni.models.wan.vae import VaeConfig
from vllm_omni.params import DiffusionParams


@dataclass(frozen=True)
class Case:
    """One request."""

    length: int  # text tokens
    steps: int
    guidance: float
    size: tuple[int, int]  # height, width
    num_frames: int
    picture: tuple[int, int] | None = None  # width and height of the first frame

    def image(self) -> Image.Image | None:
        if self.picture is None:
            return None
        coarse = np.random.default_rng(3).integers(0, 256, (3, 4, 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize(self.picture)

    def params(self, seed: int) -> DiffusionParams:
        return DiffusionParams(
            height=self.size[0],
            width=self.size[1],
            num_frames=self.num_frames,
            guidance_scale=self.guidance,
            num_inference_steps=self.steps,
            seed=seed,
            image=self.image(),
        )


OF_WORDS = [
    Case(5, 3, 1.0, (64, 64), 9),
    Case(33, 4, 5.0, (32, 96), 5),
    Case(7, 3, 2.5, (64, 64), 9),
    Case(300, 5, 4.0, (96, 32), 1),
]
OF_PICTURES = [Case(6, 3, 4.0, (64, 64), 9, (80, 60)), Case(9, 2, 1.0, (32, 64), 5, (64, 32))]
ALL = [*OF_WORDS, *OF_PICTURES]


def expected(pipeline: Any, case: Case, seed: int) -> np.ndarray:
    image = case.image()
    given = {}
    if image is not None:
        given["image"] = image
        pipeline = WanImageToVideoPipeline(**pipeline.components, expand_timesteps=True)
        pipeline.set_progress_bar_config(disable=True)
    video = pipeline(
        **given,
        prompt_embeds=reference_states(case.length, seed),
        negative_prompt_embeds=reference_states(9, 1000),
        guidance_scale=case.guidance,
        height=case.size[0],
        width=case.size[1],
        num_frames=case.num_frames,
        num_inference_steps=case.steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).frames[0]
    return (video * 255).round().astype(int)


def submit(stage: DiffusionEngine, cases: Sequence[Case], seeds: Sequence[int]) -> None:
    for seed in seeds:
        asked = task(str(seed), cases[seed].params(seed), cases[seed].length, seed)
        stage.spec.check(asked.request, asked.params, BOTH)
        stage.submit(asked)


def videos(events: dict[str, StageEvent]) -> dict[int, np.ndarray]:
    done = {int(key): event for key, event in events.items() if isinstance(event, StageDone)}
    assert len(done) == len(events), events
    return {key: event.payload.tensors["video"][0].numpy().astype(int) for key, event in done.items()}


def made(stage: DiffusionEngine, cases: Sequence[Case], seeds: Sequence[int]) -> dict[int, np.ndarray]:
    submit(stage, cases, seeds)
    return videos(run(stage))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ti2v")


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    return random_pipeline(folder)


@pytest.fixture(scope="module")
def crowd(folder: Path, pipeline: Any) -> dict[int, np.ndarray]:
    """Of words and of pictures, sizes, lengths, step counts, guidance, short and long texts, all in ONE batch."""
    return made(engine(folder), ALL, range(len(ALL)))


def test_videos_of_one_batch_equal_the_reference_pipelines(pipeline: Any, crowd: dict[int, np.ndarray]) -> None:
    for seed, case in enumerate(ALL):
        video = expected(pipeline, case, seed)
        assert crowd[seed].shape == (case.num_frames, *case.size, 3)
        assert np.abs(crowd[seed] - video).max() <= 2, case
        assert video.std() > 10, "a flat picture would prove nothing"


def test_a_video_is_the_same_alone_and_in_a_crowd(folder: Path, crowd: dict[int, np.ndarray]) -> None:
    for seed in (0, 1, 4):
        alone = made(engine(folder, max_batch_size=1), ALL, [seed])[seed]
        assert np.abs(alone - crowd[seed]).max() <= 1, ALL[seed]


def test_a_checkpoint_of_wan_2_1_with_another_sampler_equals_the_reference(tmp_path: Path) -> None:
    pipeline = random_pipeline(tmp_path, is_ti2v=False, sampler=euler())
    stage = engine(tmp_path)
    got = made(stage, OF_WORDS, [1, 2])
    for seed, video in got.items():
        assert np.abs(video - expected(pipeline, OF_WORDS[seed], seed)).max() <= 2, OF_WORDS[seed]
    assert stage.spec.frame_rate == 16.0
    with pytest.raises(InvalidRequestError, match="videos of words alone"):
        stage.spec.check(task("0", OF_PICTURES[0].params(0)).request, OF_PICTURES[0].params(0), BOTH)


def test_decoding_goes_frame_by_frame_and_ends_with_its_request(folder: Path, pipeline: Any) -> None:
    """Progress between the frames of latents, other requests go on meanwhile, and a request that is gone holds
    nothing."""
    stage = engine(folder)
    submit(stage, OF_WORDS, [0, 1])
    shown = task("shown", replace(OF_WORDS[0].params(0), num_previews=1), 5)
    stage.submit(shown)
    previews = []
    while not stage._decoding:
        previews += [event.previews for event in stage.step() if isinstance(event, StageProgress)]
    assert [found.shape for found in previews if found is not None] == [(1, 64, 64, 3)]
    stage.abort("shown")
    decoded = stage._decoding[0]
    events = stage.step()
    assert len(decoded.pieces) == 2 and decoded.pieces[0].shape[0] == 1 and decoded.pieces[1].shape[0] == 4
    assert {event.request_id for event in events if isinstance(event, StageProgress)} == {"0", "1"}
    stage.abort("0")
    stage.check_integrity()
    assert run(stage).keys() == {"1"}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"num_frames": 8}, "one more than a multiple of 4: 5 or 9"),
        ({"height": 48}, "height: got 48, expected a multiple of 32"),
        ({"strength": 0.5}, "strength: Wan does not read it"),
        ({"extra": {"flow": 3}}, "reads 'shift' alone"),
        ({"extra": {"shift": -1}}, "extra.shift"),
        ({"num_frames": 100_001}, "limits"),
        ({"num_frames": 997, "height": 1024, "width": 1024}, "num_outputs \\* num_frames"),
        ({"image": b"no picture"}, "image"),
    ],
)
def test_what_cannot_be_made_is_refused(folder: Path, pipeline: Any, asked: dict[str, Any], message: str) -> None:
    params = DiffusionParams(**{"height": 64, "width": 64, "num_frames": 5, **asked})
    with pytest.raises(InvalidRequestError, match=message):
        spec(folder).check(task("0", params).request, params, BOTH)


def test_a_shift_and_a_step_cache_change_the_video_and_nothing_else(folder: Path, crowd: dict[int, np.ndarray]) -> None:
    case, seed = OF_WORDS[2], 2
    params = replace(case.params(seed), extra={"shift": 1.0})
    stage = engine(folder)
    stage.submit(task("2", params, case.length, seed))
    shifted = videos(run(stage))[2]
    assert np.abs(shifted - crowd[seed]).max() > 10
    cached = engine(folder, cache={"policy": "first_block", "threshold": 1e9})
    submit(cached, ALL, [2, 4])
    events = run(cached)
    assert all(event.metrics["cache_hits"] > 0 for event in events.values() if isinstance(event, StageDone))
    assert videos(events)[4].shape == crowd[4].shape


@pytest.mark.parametrize(
    "values",
    [
        {"boundary_ratio": 0.875, "transformer_2": ["diffusers", "WanTransformer3DModel"]},
        {"boundary_ratio": 0.875},
        {"transformer_2": ["diffusers", "WanTransformer3DModel"]},
    ],
)
def test_two_experts_are_refused_with_the_way_out(
    folder: Path, pipeline: Any, tmp_path: Path, values: dict[str, Any]
) -> None:
    shutil.copytree(folder, tmp_path / "a14b")
    change_index(tmp_path / "a14b", **values)
    with pytest.raises(ConfigError, match=r"boundary_ratio: got (0\.875|None).*kind: diffusers"):
        spec(tmp_path / "a14b")


def test_decoding_is_planned_as_far_as_memory_goes(folder: Path, pipeline: Any) -> None:
    known = spec(folder)
    whole = known.plan_memory().wanted_bytes
    pixel_bytes = int(14.5 * (2 + 1) * 4 * 4 / 2**2 * 4)
    assert known.plan_memory().decoding_bytes == 0 and whole == 704 * 1280 * pixel_bytes
    known.grant_memory(100 * 200 * pixel_bytes)
    plan = known.plan_memory()
    assert plan.decoding_bytes == 100 * 200 * pixel_bytes and plan.wanted_bytes == whole
    assert "memory suffices for 141x141 pixels" in plan.remark
    known.grant_memory(whole)
    assert known.plan_memory().remark == "" and known.tiling() is None
    with pytest.raises(ConfigError, match="decodes nothing in tiles"):
        spec(folder, vae_tiling="always")


@pytest.mark.parametrize(
    ("widths", "pixel_bytes"),
    [  # measured on a CPU: the rise of resident memory over the third frame of latents
        ({"base_dim": 32}, 14625),
        ({"base_dim": 16}, 7244),
        ({"decoder_base_dim": 64, "is_residual": True, "patch_size": 2, "scale_factor_spatial": 16}, 9086),
        ({"decoder_base_dim": 32, "is_residual": True, "patch_size": 2, "scale_factor_spatial": 16}, 5397),
    ],
)
def test_what_is_planned_covers_what_was_measured(tmp_path: Path, widths: dict[str, Any], pixel_bytes: int) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"dim_mult": [1, 2, 4, 4], **widths}))
    planned = VaeConfig.from_folder(tmp_path).decoding_size(1000).pixel_bytes
    assert pixel_bytes <= planned <= 1.25 * pixel_bytes


@pytest.mark.parametrize("config", [{"base_dim": 0}, {"decoder_base_dim": "x"}, {"dim_mult": [1, 2, 4, -1]}])
def test_widths_that_are_none_are_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=f"config.json: {next(iter(config))}"):
        VaeConfig.from_folder(tmp_path)
