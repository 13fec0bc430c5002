"""Where a model comes from: a hub repository is looked up once and fetched no further than needed, a shipped model
finds its config, and a folder may go when it is loaded.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hub import Hub, serving

from vllm_omni import DiffusionParams, Omni, SamplingParams
from vllm_omni.config.shipped import config_for_model, shipped_configs
from vllm_omni.entrypoints.cli import main
from vllm_omni.entrypoints.loading import open_pipeline
from vllm_omni.errors import ConfigError
from vllm_omni.utils.files import assets_folder


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving("owner/name", assets_folder() / "tiny-image") as running:
        yield running


def command_line(hub: Hub, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, since the library reads its address when it is imported."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "vllm_omni", *arguments]
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, check=False, timeout=120
    )


def num_files(suffix: str) -> int:
    """Of the model itself: its LoRA is read from the package, by name."""
    files = (assets_folder() / "tiny-image").rglob(f"*{suffix}")
    return sum(file.parent.name != "lora" for file in files)


def test_a_repository_is_looked_up_once_and_fetched_once(hub: Hub, tmp_path: Path) -> None:
    """However many stages name it; and `check` of one that is here asks for no header."""
    arguments = ["--config", "tiny_image", "--model", "owner/name", "-o", "x.png", "--steps", "1"]
    done = command_line(hub, tmp_path, "generate", "a red circle", "a blue square", *arguments)
    assert done.returncode == 0, done.stderr
    assert hub.lookups == 2  # its side files, then the weights of the parts that they name
    asked = [path for method, path, _ in hub.asked if method == "GET" and path.endswith(".safetensors")]
    assert len(asked) == len(set(asked)) == num_files(".safetensors")
    hub.asked.clear()
    assert command_line(hub, tmp_path, "check", "tiny_image", "--model", "owner/name").returncode == 0
    assert hub.sent(".safetensors") == 0


@pytest.mark.parametrize("config", [["tiny_image"], []], ids=["a config", "the model's own"])
def test_check_of_a_repository_fetches_no_weights(config: list[str], hub: Hub, tmp_path: Path) -> None:
    done = command_line(hub, tmp_path, "check", *config, "--model", "owner/name")
    assert done.returncode == 0, done.stderr
    here = open_pipeline("tiny_image" if config else "z_image", model=str(assets_folder() / "tiny-image"))
    weights = sum(spec.plan_memory().weights_bytes for spec in here.specs.values())
    assert weights > 1_000_000 and "weights" in done.stdout
    assert hub.sent(".safetensors") <= num_files(".safetensors") * 100_001  # what holds a header, of each
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    assert not list(Path("/tmp").glob("vllm-omni-headers-*"))


def test_check_says_the_same_of_a_repository_as_of_its_folder(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remote = command_line(hub, tmp_path, "check", "tiny_image", "--model", "owner/name")
    assert remote.returncode == main(["check", "tiny_image", "--model", str(assets_folder() / "tiny-image")]) == 0
    assert [line for line in remote.stdout.splitlines() if "MiB" in line] == [
        line for line in capsys.readouterr().out.splitlines() if "MiB" in line
    ]


def test_check_wants_a_config_or_a_model(hub: Hub, tmp_path: Path) -> None:
    done = command_line(hub, tmp_path, "check")
    assert done.returncode == 2 and "CONFIG, or --model" in done.stderr and hub.asked == []


@pytest.mark.parametrize("asset", sorted(path.name for path in assets_folder().iterdir() if path.is_dir()))
@pytest.mark.parametrize("form", ["asset://{}", "asset://{}/", "{folder}", "{folder}/"])
def test_a_shipped_model_finds_its_own_config_by_any_of_its_names(asset: str, form: str) -> None:
    name = form.format(asset, folder=assets_folder() / asset)
    assert open_pipeline(model=name).config.name == asset


def test_other_folders_find_the_config_of_their_kind(tmp_path: Path) -> None:
    copy = tmp_path / "tiny-speech"
    shutil.copytree(assets_folder() / "tiny-speech", copy)
    assert config_for_model(copy) == shipped_configs()["qwen_omni"]
    with pytest.raises(ConfigError, match="neither model_index"):
        config_for_model(tmp_path)


CASES = {
    "tiny-image": ("a red circle", DiffusionParams(num_inference_steps=2, guidance_scale=2.0, seed=3)),
    "tiny-audio": ("C4 then E4, square, fast", DiffusionParams(num_inference_steps=2, seed=3)),
    "tiny-speech": ("read 3", {"talker": SamplingParams(max_tokens=8, temperature=0.0)}),
    "tiny-talker": ("3", SamplingParams(max_tokens=8)),
}


@pytest.mark.parametrize("asset", CASES)
@pytest.mark.parametrize("what", ["deleted", "moved", "the working directory changed"])
def test_a_folder_may_go_when_it_is_loaded(
    asset: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, params = CASES[asset]
    folder = tmp_path / "model"
    shutil.copytree(assets_folder() / asset, folder)
    monkeypatch.chdir(tmp_path)
    with Omni(asset.replace("-", "_"), model="./model", progress=False) as omni:
        if what == "deleted":
            shutil.rmtree(folder)
        elif what == "moved":
            folder.rename(tmp_path / "elsewhere")
        else:
            monkeypatch.chdir("/")
        outputs = omni.generate([prompt, prompt + " "], params)
    assert [output.error for output in outputs] == [None, None]
