"""What is asked of every training tool: one command makes all, and a second run only what is missing."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch


def assert_one_command_that_resumes(
    train: ModuleType, folder: Path, lost: str, num_results: int, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The quick training, then once more without the part `lost` of the runs; num_results: of
    all parts together. The folder of the finished model.
    """
    runs, asset = folder / "runs", folder / "asset"
    arguments = ["--quick", "--runs", str(runs), "--asset", str(asset)]
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    train.main(arguments)
    weights = {path: path.read_bytes() for path in asset.rglob("*.safetensors")}
    written = {path: path.stat().st_mtime_ns for path in [*runs.rglob("checkpoint.pt"), runs / "data.safetensors"]}
    assert len(written) == num_results and weights
    shutil.rmtree(asset)
    shutil.rmtree(runs / lost)
    train.main(arguments)
    assert {path: path.read_bytes() for path in asset.rglob("*.safetensors")} == weights
    again = [path for path, at in written.items() if path.stat().st_mtime_ns != at]
    assert again == [runs / lost / "checkpoint.pt"]
    return asset
