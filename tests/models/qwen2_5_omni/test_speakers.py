"""The voices' file: what is in it, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.speech import SPEAKERS, tiny_speakers

from vllm_omni.errors import CheckpointError, ConfigError, InvalidRequestError
from vllm_omni.models.qwen2_5_omni.speakers import Speakers


def saved(folder: Path, content: object) -> Path:
    torch.save(content, folder / "spk_dict.pt")
    return folder


def test_voices_are_read_as_they_stand(tmp_path: Path) -> None:
    raw, speakers = tiny_speakers(), Speakers.load(saved(tmp_path, tiny_speakers()))
    assert tuple(speakers.names) == SPEAKERS and speakers.default == "Chelsie"
    for name in SPEAKERS:
        voice = speakers.get(name)
        assert voice.bos_token == raw[name]["bos_token"]
        assert torch.equal(voice.cond[None], raw[name]["cond"]) and torch.equal(
            voice.ref_mel[None], raw[name]["ref_mel"]
        )
    assert speakers.get(None) is speakers.get("Chelsie")


def test_without_chelsie_the_first_voice_is_the_default(tmp_path: Path) -> None:
    voices = tiny_speakers()
    speakers = Speakers.load(saved(tmp_path, {"Zoe": voices["Ethan"], "Ada": voices["Chelsie"]}))
    assert speakers.default == "Zoe"


@pytest.mark.parametrize("name", ["Chelsi", "", 0, ["Ethan"], "x" * 10_000])
def test_an_unknown_name_hears_the_known_ones(tmp_path: Path, name: object) -> None:
    speakers = Speakers.load(saved(tmp_path, tiny_speakers()))
    with pytest.raises(InvalidRequestError, match="speaker: got") as caught:
        speakers.get(name)
    assert len(str(caught.value)) < 300


class Foreign:
    """Something that only unpickling could bring back."""


@pytest.mark.parametrize(
    "content, words",
    [
        ({"A": Foreign()}, "damaged, or holds more"),
        ([1], "got list"),
        ({}, "expected a mapping"),
        ({"A": 3}, "A: got int"),
        ({"A": {"bos_token": "x"}}, "bos_token: got 'x'"),
        ({"A": {"bos_token": 1}}, "cond: got NoneType"),
        ({"A": {"bos_token": 1, "cond": torch.zeros(12)}}, r"cond: got torch.float32 \[12\]"),
        ({"A": {"bos_token": 1, "cond": torch.zeros(1, 12).long()}}, "cond: got torch.int64"),
        ({"A": {"bos_token": 1, "cond": torch.zeros(1, 12).to_sparse()}}, "cond: got"),
        ({"A": {"bos_token": 1, "cond": torch.full((1, 12), float("inf"))}}, "not finite"),
        ({"A": {"bos_token": 1, "cond": torch.zeros(1, 12), "ref_mel": torch.zeros(1, 0, 20)}}, "ref_mel: got"),
    ],
)
def test_files_with_something_else_are_refused(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        Speakers.load(saved(tmp_path, content))


def test_a_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"spk_dict\.pt: missing"):
        Speakers.load(tmp_path)
    (tmp_path / "spk_dict.pt").write_bytes(b"not a zip")
    with pytest.raises(CheckpointError, match=r"spk_dict\.pt"):
        Speakers.load(tmp_path)
