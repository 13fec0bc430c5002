"""Turbo or base: which steps and guidance a Z-Image folder gets by itself, and that `check` says so."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from support.diffusers_folders import random_z_image

from vllm_omni import DiffusionParams, Omni
from vllm_omni.entrypoints.cli.graph_report import describe
from vllm_omni.entrypoints.loading import open_pipeline
from vllm_omni.executor.memory import plan_memory

TURBO = {"num_inference_steps": 9, "guidance_scale": 0.0}
BASE = {"num_inference_steps": 50, "guidance_scale": 5.0}


def folder_of(path: Path, shift: float | None, **index: Any) -> Path:
    random_z_image(path)
    config: dict[str, Any] = {} if shift is None else {"shift": shift}
    FlowMatchEulerDiscreteScheduler(**config).save_pretrained(path / "scheduler")
    content = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps({**content, **index}))
    return path


@pytest.mark.parametrize(
    ("name", "shift", "index", "expected", "reason"),
    [
        ("a-folder", 3.0, {}, TURBO, "shift, 3.0"),
        ("a-folder", 6.0, {}, BASE, "shift, 6.0"),
        ("a-folder", None, {}, BASE, "shift, 1.0"),
        ("My-Z-Image-Turbo", 6.0, {}, TURBO, "'My-Z-Image-Turbo'"),
        ("z-image-base", 3.0, {}, BASE, "'z-image-base'"),
        ("a-folder", 6.0, {"_name_or_path": "Tongyi-MAI/Z-Image-Turbo"}, TURBO, "'Z-Image-Turbo'"),
        ("models--Tongyi-MAI--Z-Image-Turbo/snapshots/0a1b", 6.0, {}, TURBO, "'Z-Image-Turbo'"),
        ("turbocharged", 6.0, {}, BASE, "shift, 6.0"),
    ],
)
def test_steps_and_guidance_are_those_of_the_checkpoint(
    tmp_path: Path, name: str, shift: float | None, index: dict[str, Any], expected: dict[str, float], reason: str
) -> None:
    folder = folder_of(tmp_path / name, shift, **index)
    pipeline = open_pipeline(model=str(folder))
    assert pipeline.specs["image"].defaults == expected
    report = " ".join(describe(pipeline, plan_memory(pipeline)).split())
    assert reason in report
    assert f"num_inference_steps {expected['num_inference_steps']} (checkpoint)" in report


def test_a_base_model_takes_a_negative_prompt_and_runs_its_own_number_of_steps(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "x", 6.0)
    with Omni(model=str(folder), progress=False) as omni:
        small = DiffusionParams(height=32, width=32, seed=1)
        plain, negative = omni.generate(["a circle", {"prompt": "a circle", "negative_prompt": "blur"}], small)
    assert plain.error is None and negative.error is None
    assert plain.metrics["image"]["steps"] == 50
    assert plain.images[0].tobytes() != negative.images[0].tobytes()


def test_the_configs_own_defaults_stand_above_the_checkpoints(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "x", 6.0)

    def defaults(*overrides: str) -> dict[str, Any]:
        return dict(open_pipeline(model=str(folder), overrides=overrides).specs["image"].defaults)

    assert defaults("image.defaults={num_inference_steps: 4}") == {**BASE, "num_inference_steps": 4}
    assert defaults("image.defaults={sigmas: [1.0, 0.5]}") == {"sigmas": (1.0, 0.5), "guidance_scale": 5.0}


def test_a_default_negative_prompt_is_read_as_a_given_one_is(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "x", 6.0)
    small = DiffusionParams(height=32, width=32, seed=1, num_inference_steps=3)
    overrides = ["image.defaults.negative_prompt=blur"]

    def picture(omni: Omni, prompt: Any, params: Any = small) -> Any:
        (output,) = omni.generate([prompt], params)
        assert output.error is None, output.error
        return np.asarray(output.images[0])

    with Omni(model=str(folder), progress=False) as omni:
        given = picture(omni, {"prompt": "a circle", "negative_prompt": "blur"})
        empty = picture(omni, {"prompt": "a circle", "negative_prompt": ""})
    assert not np.array_equal(given, empty)
    with Omni(model=str(folder), overrides=overrides, progress=False) as omni:
        assert np.array_equal(picture(omni, "a circle"), given)
        assert np.array_equal(picture(omni, {"prompt": "a circle", "negative_prompt": ""}), empty)
        assert np.array_equal(picture(omni, "a circle"), given), "cached states are those of the same words"
        said = dataclasses.replace(small, negative_prompt="")
        assert np.array_equal(picture(omni, "a circle", said), empty)
