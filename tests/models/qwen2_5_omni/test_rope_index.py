"""Positions of prompts with media equal the reference's, whatever is mixed."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.media_prompts import expected_positions
from support.speech import SPECIAL, meta_thinker

from vllm_omni.worker.ar.media_reading.spans import MediaClock, MediaSpan, rope_index

CLOCK = MediaClock(25, 2.0)
VISION_BOS, VISION_EOS = 106, 107

grids = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))
frames = st.integers(3, 700)  # of mel features


def num_sound_tokens(num_frames: int) -> int:
    return ((num_frames - 1) // 2 + 1 - 2) // 2 + 1


@st.composite
def prompts(draw: Any, with_tracks: bool) -> tuple[list[int], list[tuple[int, MediaSpan]], list[int]]:
    """Token ids, the spans with their places, frames of every sound in the order of the text."""
    ids, placed, sounds = [1] * draw(st.integers(1, 4)), [], []
    for kind in draw(st.lists(st.sampled_from(["image", "audio", "video"]), min_size=1, max_size=4)):
        num_frames = draw(frames)
        if kind == "image":
            _, height, width = draw(grids)
            span = MediaSpan("image", (1, height, width))
        elif kind == "audio":
            span = MediaSpan("audio", num_audio_tokens=num_sound_tokens(num_frames))
        else:
            rate = draw(st.sampled_from([0.5, 1.0, 2.0, 3.0, 24.0]))
            track = num_sound_tokens(num_frames) if with_tracks else 0
            span = MediaSpan("video", draw(grids), 2 / rate, track)
        if span.num_audio_tokens:
            sounds.append(num_frames)
        bos, eos = ("audio_bos", "audio_eos") if kind == "audio" else (None, None)
        ids.append(SPECIAL[bos] if bos else VISION_BOS)
        placed.append((len(ids), span))
        body = [SPECIAL[run] for run, positions in span.pieces(CLOCK) for _ in range(positions.shape[1])]
        ids += [SPECIAL["audio_bos"], *body, SPECIAL["audio_eos"]] if span.has_track else body
        ids += [SPECIAL[eos] if eos else VISION_EOS] + [1] * draw(st.integers(0, 3))
    return ids, placed, sounds


def check(ids: list[int], placed: list[tuple[int, MediaSpan]], sounds: list[int], with_tracks: bool) -> None:
    expected, delta = expected_positions(meta_thinker(), ids, placed, sounds, with_tracks)
    positions, own_delta = rope_index(len(ids), placed, CLOCK)
    assert torch.equal(positions, expected.long())
    assert own_delta == int(delta)


@settings(max_examples=150, deadline=None)
@given(prompts(with_tracks=False))
def test_positions_equal_the_reference(prompt: Any) -> None:
    check(*prompt, with_tracks=False)


@settings(max_examples=150, deadline=None)
@given(prompts(with_tracks=True))
def test_positions_equal_the_reference_when_videos_bring_their_sound(prompt: Any) -> None:
    check(*prompt, with_tracks=True)


@settings(max_examples=100, deadline=None)
@given(prompts(with_tracks=True))
def test_a_span_knows_its_number_of_tokens(prompt: Any) -> None:
    ids, placed, _ = prompt
    media = set(SPECIAL.values())
    for start, span in placed:
        assert all(token in media for token in ids[start : start + span.num_tokens])
        assert sum(positions.shape[1] for _, positions in span.pieces(CLOCK)) == span.num_tokens - 2 * span.has_track


def test_text_alone_counts() -> None:
    positions, delta = rope_index(5, [], CLOCK)
    assert torch.equal(positions, torch.arange(5).expand(3, -1)) and delta == 0


def test_chunks_hold_two_seconds_of_sight_then_their_sound() -> None:
    span = MediaSpan("video", (5, 1, 1), 1.0, 125)
    runs = [(kind, positions.shape[1]) for kind, positions in span.pieces(CLOCK)]
    assert runs == [("video", 2), ("audio", 50), ("video", 2), ("audio", 50), ("video", 1), ("audio", 25)]
    assert sum(n for _, n in runs) == span.num_tokens - 2
