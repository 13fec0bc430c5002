"""Downloads: what is asked of the hub. A folder stands in for the network."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from typing import Any

import pytest

from vllm_omni.errors import ConfigError
from vllm_omni.utils.files import ModelFolders
from vllm_omni.utils.hub import fetch

PARTS = ("unet", "vae")
SMALL = {
    "model_index.json": json.dumps({"unet": ["diffusers", "U"], "vae": ["diffusers", "V"], "scheduler": ["d", "S"]}),
    "unet/config.json": "{}",
    "vae/config.json": "{}",
    "scheduler/scheduler_config.json": "{}",
}
ROOT = ["sd_xl_base_1.0.safetensors", "sd_xl_base_1.0_0.9vae.safetensors"]  # single-file checkpoints
PLAIN = [f"{part}/diffusion_pytorch_model.safetensors" for part in PARTS]
FP16 = [f"{part}/diffusion_pytorch_model.fp16.safetensors" for part in PARTS]
SHARDS = [f"unet/model.bf16-0000{index}-of-00002.safetensors" for index in (1, 2)]


class Hub:
    """A repository whose snapshot is written into a folder, as `snapshot_download` does with the same patterns."""

    def __init__(self, folder: Path, files: list[str], small: dict[str, str] = SMALL) -> None:
        self.folder = folder
        self.contents = {**small, **dict.fromkeys(files, "")}
        self.revisions: list[str | None] = []

    def snapshot_download(
        self, repository: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str] | None
    ) -> str:
        self.revisions.append(revision)
        for name, text in self.contents.items():
            is_wanted = any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)
            if is_wanted and not any(fnmatch.fnmatch(name, pattern) for pattern in ignore_patterns or ()):
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                (self.folder / name).write_text(text)
        return str(self.folder)

    def weights(self) -> list[str]:
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("files", "variant", "expected"),
    [
        ([*ROOT, *PLAIN, *FP16], None, PLAIN),
        ([*ROOT, *PLAIN, *FP16], "fp16", FP16),
        ([*ROOT, *FP16], None, FP16),
        ([*ROOT, FP16[0], PLAIN[0], PLAIN[1]], "fp16", [FP16[0], PLAIN[1]]),
        ([*SHARDS, PLAIN[1]], None, [*SHARDS, PLAIN[1]]),
        ([*SHARDS, *PLAIN], "bf16", [*SHARDS, PLAIN[1]]),
    ],
)
def test_a_pipelines_parts_are_fetched_in_one_variant_and_no_checkpoint_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], variant: str | None, expected: list[str]
) -> None:
    hub = Hub(tmp_path, files)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    assert fetch("owner/name", "v1", variant) == tmp_path
    assert hub.weights() == sorted(expected) and set(hub.revisions) == {"v1"}
    hub.revisions.clear()
    fetch("owner/name", "v1", variant)
    assert len(hub.revisions) == 1, "weights that are there already are not asked for again"


def test_other_repositories_are_fetched_with_their_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tmp_path, ["model.safetensors"], {"config.json": "{}"})
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    fetch("owner/name", None, None)
    assert hub.weights() == ["model.safetensors"]


def test_a_repository_that_cannot_be_fetched_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*arguments: Any, **rest: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ConfigError, match=r"'owner/name' .* at revision 'v1': no network"):
        ModelFolders().resolve("owner/name", "v1")


def test_a_revision_of_a_local_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"revision: got 'v1', but .* is a local folder"):
        ModelFolders().resolve(str(tmp_path), "v1")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    assert ModelFolders().resolve(str(snapshot), "v1") == snapshot
