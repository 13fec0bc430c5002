"""`vllm-omni calibrate`: the numbers of a step cache are found, written and used, and of another model refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_omni import DiffusionParams, Omni
from vllm_omni.config.shipped import find_config
from vllm_omni.entrypoints.cli import main
from vllm_omni.errors import ConfigError
from vllm_omni.utils.files import resolve_model_folder


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return Path(shutil.copy(find_config("tiny_image"), tmp_path / "mine.yaml"))


@pytest.fixture
def prompts(tmp_path: Path) -> list[str]:
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\na large pink star\n")
    return ["--prompts", str(path)]


@pytest.mark.parametrize("policy", ["teacache", "magcache"])
def test_what_is_written_is_what_the_stage_runs_with(
    config: Path, prompts: list[str], policy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = config.read_text().splitlines()
    arguments = ["calibrate", str(config), "--policy", policy, "--steps", "8", "--degree", "2", *prompts]
    assert main([*arguments, "--write", "--plot", str(tmp_path / "fit.png")]) == 0
    assert "image: " + policy in capsys.readouterr().err
    assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")
    assert set(before) <= set(config.read_text().splitlines())
    value = DiffusionParams(seed=1, num_inference_steps=8)
    with Omni(config, overrides=["image.cache.threshold=10.0"], device="cpu", progress=False) as omni:
        assert omni.generate("a red circle", value)[0].metrics["image"]["cache_hits"] > 0
    with Omni(config, overrides=["image.cache.threshold=0.0"], device="cpu", progress=False) as omni:
        assert omni.generate("a red circle", value)[0].metrics["image"]["cache_hits"] == 0
        other = omni.generate("a red circle", DiffusionParams(seed=1, num_inference_steps=7))[0]
    assert (other.error is None) == (policy == "magcache"), "a polynomial holds for its number of steps"


def test_other_weights_refuse_the_numbers(config: Path, prompts: list[str], tmp_path: Path) -> None:
    assert main(["calibrate", str(config), "--policy", "magcache", "--steps", "3", *prompts, "--write"]) == 0
    folder = shutil.copytree(resolve_model_folder("asset://tiny-image"), tmp_path / "other")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    file.chmod(0o600)
    weights = load_file(file)
    save_file({name: weight + (torch.rand_like(weight) * 0.01) for name, weight in weights.items()}, file)
    with pytest.raises(ConfigError, match=r"cache\.fitted_on: got '\w+', but .*another model"):
        Omni(config, model=str(folder), device="cpu", progress=False)


def test_a_shipped_config_stays_as_it_is_and_a_copy_is_written(
    prompts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = find_config("tiny_audio").read_text()
    assert main(["calibrate", "tiny_audio", "--write"]) == 1
    assert "ships with the package and stays as it is; write a copy with -o FILE" in capsys.readouterr().err
    arguments = ["calibrate", "tiny_audio", "--policy", "magcache", "--steps", "3", *prompts]
    assert main(arguments) == 0
    line = capsys.readouterr().out.strip()
    assert line.startswith("cache: {policy: magcache, ratios: [1.0, ")
    assert main([*arguments, "-o", str(tmp_path / "copy.yaml")]) == 0
    assert " ".join((tmp_path / "copy.yaml").read_text().split()).count(line) == 1
    assert find_config("tiny_audio").read_text() == before


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nothing"], "no shipped config"),
        (["tiny_image", "--stage", "imge"], "--stage: got 'imge', expected a dit stage (did you mean 'image'"),
        (["qwen3"], "expected one dit stage, which has a step cache, found none"),
        (["tiny_omni"], "found image, sound; choose one with --stage"),
        (["tiny_image", "--degree", "0"], "--degree: got 0"),
        (["tiny_image", "--plot", "fit.jpg"], "expected a name that ends in .png"),
        (["tiny_image", "-o", "copy.txt"], "expected a name that ends in .yaml or .yml"),
        (["tiny_image", "--prompts", "none.txt"], "--prompts: got 'none.txt'"),
        (["tiny_image", "--steps", "2"], "expected more than 4, the degree of the polynomial"),
    ],
)
def test_what_cannot_be_calibrated_says_why(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", *arguments]) == 1
    assert words in capsys.readouterr().err
