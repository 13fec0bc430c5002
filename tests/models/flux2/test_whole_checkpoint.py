"""A FLUX.2 [klein] checkpoint with every part, run by its path alone, against the pipeline of diffusers on the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from support.flux2 import picture, whole_pipeline

from vllm_omni import DiffusionParams, Omni
from vllm_omni.errors import InvalidRequestError

SIDES = {"height": 64, "width": 64}
GUIDED = {"guidance_scale": 4.0, "num_inference_steps": 3}
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [  # prompt, parameters, pictures
    ("a red circle left of a blue square", SIDES | GUIDED, {}),
    ("", {"width": 96, "height": 32, "guidance_scale": 1.0, "num_inference_steps": 5}, {}),
    ("the end of the world " * 200, {**GUIDED}, {"image": [picture(64, 96, 0), picture(75, 64, 1)]}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole_pipeline(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def omni(folder: Path) -> Iterator[Omni]:
    with Omni(model=str(folder), progress=False, dtype="float32") as loaded:
        yield loaded


def test_pictures_of_a_path_equal_the_reference_pipeline(folder: Path, omni: Omni) -> None:
    pipeline = Flux2KleinPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    params = [DiffusionParams(seed=index, **more, **images) for index, (_, more, images) in enumerate(CASES)]
    outputs = omni.generate([prompt for prompt, _, _ in CASES], params)
    for index, (output, (prompt, more, images)) in enumerate(zip(outputs, CASES, strict=True)):
        assert output.error is None, output.error
        expected = pipeline(prompt=prompt, **more, **images, generator=torch.Generator().manual_seed(index)).images[0]
        difference = np.asarray(output.images[0]).astype(int) - np.asarray(expected).astype(int)
        assert np.abs(difference).max() <= 2, index
        assert np.asarray(expected).std() > 10, index


def test_a_negative_prompt_acts_with_guidance_and_is_refused_without(omni: Omni) -> None:
    plain, fog = omni.generate(
        ["a red circle", {"prompt": "a red circle", "negative_prompt": "fog"}],
        DiffusionParams(seed=1, **SIDES, **GUIDED),
    )
    difference = np.asarray(plain.images[0]).astype(int) - np.asarray(fog.images[0]).astype(int)
    assert np.abs(difference).max() > 10
    unguided = DiffusionParams(seed=1, **SIDES, guidance_scale=1.0, num_inference_steps=1)
    refused = omni.generate({"prompt": "a red circle", "negative_prompt": "fog"}, unguided)[0].error
    assert isinstance(refused, InvalidRequestError)
    assert "negative_prompt: guidance_scale 1 never reads it" in str(refused)
