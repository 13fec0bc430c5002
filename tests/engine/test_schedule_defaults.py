"""What a request says of the noise schedule, or of what it does not want, stands above every default that says the same
in another way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.diffusers_folders import random_z_image

from vllm_omni import DiffusionParams, Omni, OmniOutput
from vllm_omni.errors import InvalidRequestError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("z-image")
    random_z_image(path)
    return path


def adapter(folder: Path, **defaults: Any) -> dict[str, Any]:
    stage = {"kind": "diffusers", "output": "image", "model": str(folder)}
    return {"stages": {"image": {**stage, "defaults": {"guidance_scale": 0.0, **defaults}}}, "outputs": ["image"]}


@pytest.fixture(params=["native", "adapter"])
def load(request: pytest.FixtureRequest, folder: Path) -> Iterator[Any]:
    opened: list[Omni] = []

    def loaded(**defaults: Any) -> Omni:
        if request.param == "adapter":
            omni = Omni(adapter(folder, **defaults), progress=False)
        else:
            text = ", ".join(f"{name}: {value}" for name, value in {"guidance_scale": 0.0, **defaults}.items())
            omni = Omni(model=str(folder), overrides=[f"image.defaults={{{text}}}"], progress=False)
        opened.append(omni)
        return omni

    yield loaded
    for omni in opened:
        omni.close()


def drawn(omni: Omni, **rest: Any) -> OmniOutput:
    (output,) = omni.generate("a circle", DiffusionParams(seed=1, height=32, width=32, **rest))
    return output


def steps(omni: Omni, **rest: Any) -> int:
    output = drawn(omni, **rest)
    assert output.error is None, output.error
    return int(output.metrics["image"]["steps"])


def test_sigmas_of_a_request_stand_above_the_default_number_of_steps(load: Any) -> None:
    omni = load(num_inference_steps=5)
    assert steps(omni) == 5
    assert steps(omni, sigmas=[1.0, 0.6, 0.3]) == 3


def test_the_number_of_steps_of_a_request_stands_above_default_sigmas(load: Any) -> None:
    omni = load(sigmas=[1.0, 0.5])
    assert steps(omni) == 2
    assert steps(omni, num_inference_steps=4) == 4


def test_both_in_one_request_must_agree(load: Any) -> None:
    omni = load()
    assert steps(omni, num_inference_steps=2, sigmas=[1.0, 0.5]) == 2
    refused = drawn(omni, num_inference_steps=3, sigmas=[1.0, 0.5])
    assert isinstance(refused.error, InvalidRequestError) and "leave one of the two out" in str(refused.error)


def test_sigmas_of_a_request_stand_above_a_default_shift_and_timesteps() -> None:
    defaults = {"extra": {"shift": 3.0, "timesteps": [900, 500], "normalize": False}, "num_inference_steps": 8}
    assert DiffusionParams(sigmas=[1.0]).with_defaults(defaults) == DiffusionParams(
        sigmas=[1.0], extra={"normalize": False}
    )
    assert DiffusionParams(num_inference_steps=4).with_defaults(defaults).extra == {"shift": 3.0, "normalize": False}
    timesteps = DiffusionParams(extra={"timesteps": [900]}).with_defaults(defaults)
    assert timesteps == DiffusionParams(extra={"timesteps": [900], "normalize": False})


def test_the_negative_prompt_of_a_request_stands_above_a_default_one(folder: Path) -> None:
    with Omni(adapter(folder, guidance_scale=3.0, negative_prompt="blur"), progress=False) as omni:
        small = DiffusionParams(seed=1, height=32, width=32, num_inference_steps=2)
        as_params = dataclasses.replace(small, negative_prompt="sharp")
        default, other, same = omni.generate(
            ["a circle", {"prompt": "a circle", "negative_prompt": "sharp"}, "a circle"], [small, small, as_params]
        )
    assert other.images[0].tobytes() == same.images[0].tobytes() != default.images[0].tobytes()
