"""Seconds, latent frames and audio codes of a folder, and the audio codes as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.music import HOP, POOL, RATE, codes, save_folder

from vllm_omni.errors import ConfigError
from vllm_omni.models.ace_step.audio_codes import find_codes, is_codes_alone
from vllm_omni.models.ace_step.folder import AceStepFolder
from vllm_omni.models.ace_step.geometry import MusicGeometry


def test_the_geometry_is_that_of_the_folder(tmp_path: Path) -> None:
    geometry = MusicGeometry.from_folder(AceStepFolder(save_folder(tmp_path)))
    assert geometry == MusicGeometry(RATE, channels=2, hop=HOP, frames_per_code=POOL)
    assert (geometry.frame_s, geometry.frames_per_s, geometry.code_s) == (0.04, 25.0, 0.16)


def test_a_result_has_every_frame_that_it_begins_and_a_moment_lies_in_one(tmp_path: Path) -> None:
    geometry = MusicGeometry(RATE, channels=2, hop=HOP, frames_per_code=POOL)
    assert [geometry.num_frames(seconds) for seconds in (0.01, 0.04, 0.041, 2.0)] == [1, 1, 2, 50]
    assert [geometry.frame_at(seconds) for seconds in (0.0, 0.039, 0.041, 2.0)] == [0, 0, 1, 50]
    assert [geometry.num_codes(frames) for frames in (1, 4, 5)] == [1, 1, 2]


@pytest.mark.parametrize(
    ("vae", "pool", "words"),
    [
        ({"sampling_rate": 0}, POOL, "sampling_rate: got 0, expected at least 1"),
        ({"audio_channels": "two"}, POOL, "audio_channels: got 'two'"),
        ({"downsampling_ratios": []}, POOL, r"downsampling_ratios: got \[\], expected a list"),
        ({"downsampling_ratios": [4, 0]}, POOL, "downsampling_ratios: got 0"),
        ({}, 0, "pool_window_size: got 0"),
    ],
)
def test_folders_that_make_no_sense_are_refused(tmp_path: Path, vae: dict[str, Any], pool: int, words: str) -> None:
    folder = AceStepFolder(save_folder(tmp_path, vae, pool))
    with pytest.raises(ConfigError, match=words):
        MusicGeometry.from_folder(folder)


def test_codes_are_found_in_order_and_told_from_other_words() -> None:
    assert find_codes(codes(3)) == [0, 7, 14]
    assert find_codes("la <|audio_code_5|> la") == [5] and not is_codes_alone("la <|audio_code_5|>")
    assert is_codes_alone(f" {codes(2)}\n{codes(1)} ") and not is_codes_alone(" ") and not is_codes_alone("")
    assert find_codes("<|audio_code_9999999999|>") == []
