"""A folder of ACE-Step's configuration files and the `music_prompt` stage of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.music import Prompter, save_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_folder(tmp_path / "model")


@pytest.fixture
def prompter(folder: Path) -> Prompter:
    return Prompter(folder)
