"""Media prompts: what may be said, and that content ids tell contents apart. Speakers: what a file may hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.speech import SPEAKERS, tiny_speakers

from vllm_omni.errors import CheckpointError, ConfigError, InvalidRequestError
from vllm_omni.models.qwen2_5_omni.speakers import Speakers
from vllm_omni.worker.ar.media_prompt import MediaItem, MediaPrompt, content_ids_of


def sound(value: float = 0.0, start: int = 1) -> MediaItem:
    return MediaItem("audio", torch.tensor([start, start + 1]), {"features": torch.full((2, 8), value)})


def test_content_ids_depend_on_content_and_offset_alone() -> None:
    ids = content_ids_of([5, 9, 9, 6], [sound()])
    assert ids[0] == 5 and ids[3] == 6
    assert ids[1] != ids[2] and min(ids[1:3]) >= 1 << 64
    assert content_ids_of([7, 7, 9, 9], [sound(start=2)])[2:] == ids[1:3]
    assert not set(content_ids_of([5, 9, 9, 6], [sound(1.0)])[1:3]) & set(ids)


def test_what_alone_changes_positions_changes_content_ids_too() -> None:
    def film(seconds: float) -> MediaItem:
        pixels = torch.zeros(4, 3)
        inputs = {
            "pixel_values": pixels,
            "grid_thw": torch.tensor([1, 2, 2]),
            "second_per_grid": torch.tensor(seconds),
        }
        return MediaItem("video", torch.tensor([0]), inputs)

    assert content_ids_of([1], [film(1.0)]) != content_ids_of([1], [film(2.0)])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"content_ids": [1]}, "3 token ids, 1 content ids"),
        ({"positions": torch.zeros(3, 2)}, r"positions \[3, 2\]"),
        ({"items": [sound(start=2)]}, "audio at 2 places"),
    ],
)
def test_a_prompt_that_does_not_fit_together_is_refused(changes: dict[str, Any], complaint: str) -> None:
    parts = {"token_ids": [1, 2, 3], "content_ids": [1, 2, 3], "positions": torch.zeros(3, 3), "position_delta": 0}
    with pytest.raises(InvalidRequestError, match=complaint):
        MediaPrompt(**{**parts, **changes})


def test_an_item_says_exactly_what_its_encoder_reads() -> None:
    with pytest.raises(InvalidRequestError, match="image with pixel_values, grid_thw"):
        MediaItem("image", torch.tensor([0]), {"features": torch.zeros(1)})


def test_speakers_are_found_by_name_and_the_preferred_one_without(tmp_path: Path) -> None:
    torch.save(tiny_speakers(), tmp_path / "spk_dict.pt")
    speakers = Speakers.load(tmp_path)
    assert speakers.names == list(SPEAKERS)
    assert speakers.get(None) is speakers.get("Chelsie")
    assert speakers.get("Ethan").bos_token == 112
    assert speakers.get("Ethan").ref_mel.shape == (35, 20)
    with pytest.raises(InvalidRequestError, match=r"got 'ethan' .did you mean 'Ethan'"):
        speakers.get("ethan")
    with pytest.raises(InvalidRequestError, match=r"got 3 .known: Chelsie, Ethan"):
        speakers.get(3)


def test_without_the_preferred_speaker_the_first_is_the_default(tmp_path: Path) -> None:
    torch.save({name: tiny_speakers()["Ethan"] for name in ("B", "A")}, tmp_path / "spk_dict.pt")
    assert Speakers.load(tmp_path).default == "B"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ([], "got list, expected a mapping"),
        ({}, "got dict"),
        ({"A": 3}, "got int"),
        ({"A": {**tiny_speakers()["Ethan"], "bos_token": "x"}}, "bos_token: got 'x'"),
        ({"A": {**tiny_speakers()["Ethan"], "cond": torch.zeros(12)}}, r"cond: got torch.float32 \[12\]"),
        ({"A": {**tiny_speakers()["Ethan"], "ref_mel": torch.zeros(1, 0, 20)}}, "ref_mel: got torch.float32"),
        ({"A": {**tiny_speakers()["Ethan"], "ref_mel": torch.full((1, 3, 20), float("nan"))}}, "not finite"),
        ({"A": {**tiny_speakers()["Ethan"], "ref_mel": torch.zeros(1, 3, 20).to_sparse()}}, "ref_mel"),
    ],
)
def test_a_speaker_file_that_holds_something_else_is_refused(content: Any, complaint: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "spk_dict.pt")
    with pytest.raises(CheckpointError, match=complaint):
        Speakers.load(tmp_path)


def test_a_missing_or_pickled_speaker_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"spk_dict\.pt: missing"):
        Speakers.load(tmp_path)
    torch.save({"A": Path("x")}, tmp_path / "spk_dict.pt")
    with pytest.raises(CheckpointError, match="holds more than"):
        Speakers.load(tmp_path)
