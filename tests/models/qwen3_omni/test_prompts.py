"""Prompts with media for Qwen3-Omni equal those of transformers' processor: tokens, encoder inputs and positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.media import RATE, AnyParts, FramesOneByOne, picture, read_media, tone, video_bytes
from support.media_prompts import called, expected_positions
from support.qwen3_omni import CLOCK, meta_thinker, tiny_config
from support.speech import SPECIAL, save_processor
from support.versions import needs
from transformers import AutoTokenizer, Qwen3OmniMoeProcessor, WhisperFeatureExtractor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.engine.ar.tokenizer import TextProcessor
from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.media.video_input import picked_frames
from vllm_omni.models.qwen3_omni.audio_features import tokens_of_frames
from vllm_omni.models.qwen3_omni.prompt_reader import Qwen3OmniPromptReader
from vllm_omni.worker.ar.media_prompt import MediaPrompt
from vllm_omni.worker.ar.media_reading.spans import MediaSpan, rope_index
from vllm_omni.worker.ar.media_reading.vision import VisionSettings

WIDE = [picture(64, 136, seed) for seed in range(4)]  # 136 tokens: nothing is resized


class ProcessorOfAnyParts(AnyParts, Qwen3OmniMoeProcessor):
    """The library's class and call."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("omni")
    tiny_config().save_pretrained(folder)
    return save_processor(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    images = Qwen2VLImageProcessorPil.from_pretrained(folder)
    return ProcessorOfAnyParts(
        image_processor=images,
        video_processor=FramesOneByOne(images),
        feature_extractor=WhisperFeatureExtractor.from_pretrained(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder),
    )


@pytest.fixture(scope="module")
def media(folder: Path) -> Qwen3OmniPromptReader:
    return Qwen3OmniPromptReader(folder, TextProcessor(folder).encode, LimitsConfig())


def message(*parts: Any) -> list[dict[str, Any]]:
    content = [{"type": kind, kind: source} for kind, source in parts]
    return [{"role": "user", "content": [{"type": "text", "text": "See"}, *content]}]


def check_equal(prompt: MediaPrompt, expected: Any, with_tracks: bool = False) -> None:
    ids = expected["input_ids"][0].tolist()
    assert list(prompt.token_ids) == ids
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        items = [item.inputs for item in prompt.items if item.kind == kind]
        if items:
            torch.testing.assert_close(torch.cat([one["pixel_values"] for one in items]), expected[name])
    sounds = [item.inputs["features"] for item in prompt.items if item.kind == "audio"]
    lengths = expected["feature_attention_mask"].sum(-1) if sounds else None
    for own, features, length in zip(sounds, expected.get("input_features", ()), lengths or (), strict=True):
        torch.testing.assert_close(own, features[:, :length])
    seconds = [float(item.inputs["second_per_grid"]) for item in prompt.items if item.kind == "video"]
    for kind in {item.kind for item in prompt.items}:
        places = torch.cat([item.indices for item in prompt.items if item.kind == kind]).tolist()
        assert places == [index for index, token in enumerate(ids) if token == SPECIAL[kind]]
    positions, delta = meta_thinker().get_rope_index(
        torch.tensor([ids]),
        image_grid_thw=expected.get("image_grid_thw"),
        video_grid_thw=expected.get("video_grid_thw"),
        attention_mask=torch.ones(1, len(ids)),
        use_audio_in_video=with_tracks,
        audio_seqlens=lengths,
        second_per_grids=torch.tensor(seconds) if seconds else None,
    )
    torch.testing.assert_close(prompt.positions.float(), positions[:, 0].float(), rtol=0, atol=0)
    assert prompt.position_delta == float(delta)


def test_a_mix_equals_the_library(media: Qwen3OmniPromptReader, theirs: Any) -> None:
    images, sounds, frames = [picture(24, 40), picture(16, 16, 3)], [tone(0.305), tone(1.3)], np.stack(WIDE)
    parts = [("image", images[0]), ("audio", (sounds[0], RATE)), ("video", frames), ("image", images[1])]
    messages = message(*parts)
    expected = called(
        theirs,
        messages,
        images=[Image.fromarray(image) for image in images],
        audio=[sounds[0][0]],
        videos=[frames],
    )
    check_equal(read_media(media, messages), expected)
    messages = message(("audio", (sounds[1], RATE)))
    check_equal(read_media(media, messages), called(theirs, messages, audio=[sounds[1][0]]))


@needs("transformers", "5.23", "it is asked for a video with its sound in another way before")
def test_a_video_with_its_sound_equals_the_library(media: Qwen3OmniPromptReader, theirs: Any, folder: Path) -> None:
    content = video_bytes([*WIDE, *WIDE, *WIDE[:2]], 4, tone(2.5, channels=2))
    messages = message(("video", content))
    prompt = read_media(media, messages, True)
    frames, track = decoded(content)
    indices = picked_frames(10, 4, 2, VisionSettings.of(folder).frames)
    expected = called(
        theirs,
        messages,
        videos=[frames[list(indices)]],
        audio=[track],
        audio_from_video_indices=[0],
        load_audio_from_video=True,
    )
    check_equal(prompt, expected, with_tracks=True)


def decoded(content: bytes) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    import io

    import av

    with av.open(io.BytesIO(content)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    with av.open(io.BytesIO(content)) as container:
        blocks = [frame.to_ndarray().mean(axis=0, dtype=np.float32) for frame in container.decode(audio=0)]
    return frames, np.concatenate(blocks)


def test_audio_may_be_longer_than_what_the_extractor_was_made_for_and_not_shorter_than_a_frame(
    media: Qwen3OmniPromptReader, theirs: Any
) -> None:
    long = tone(21.007)  # the extractor's 20 s and more
    messages = message(("audio", (long, RATE)))
    check_equal(read_media(media, messages), called(theirs, messages, audio=[long[0]]))
    with pytest.raises(InvalidRequestError, match=r"got 0.005 s of sound, expected at least 0.01 s"):
        read_media(media, message(("audio", (tone(0.005), RATE))))


@given(st.integers(0, 5000))
def test_the_tokens_of_audio_are_counted_as_the_library_does(num_frames: int) -> None:
    rest = num_frames % 100
    halved = ((((rest - 1) // 2 + 1) - 1) // 2 + 1 - 1) // 2 + 1
    assert tokens_of_frames(num_frames, 50) == halved + num_frames // 100 * 13


grids = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))


@st.composite
def prompts(draw: Any, with_tracks: bool) -> tuple[list[int], list[tuple[int, MediaSpan]], list[int]]:
    """Token ids, the spans with their places, frames of every sound in the order of the text."""
    ids, placed, sounds = [1] * draw(st.integers(1, 4)), [], []
    for kind in draw(st.lists(st.sampled_from(["image", "audio", "video"]), min_size=1, max_size=4)):
        num_frames = draw(st.integers(1, 700))
        num_tokens = tokens_of_frames(num_frames, 50)
        if kind == "image":
            span = MediaSpan("image", (1, *draw(grids)[1:]))
        elif kind == "audio":
            span = MediaSpan("audio", num_audio_tokens=num_tokens)
        else:
            rate = draw(st.sampled_from([0.5, 1.0, 2.0, 3.0, 24.0]))
            span = MediaSpan("video", draw(grids), 2 / rate, num_tokens if with_tracks else 0)
        if span.num_audio_tokens:
            sounds.append(num_frames)
        ids.append(SPECIAL["audio_bos"] if kind == "audio" else 106)
        placed.append((len(ids), span))
        body = [SPECIAL[run] for run, positions in span.pieces(CLOCK) for _ in range(positions.shape[1])]
        ids += [SPECIAL["audio_bos"], *body, SPECIAL["audio_eos"]] if span.has_track else body
        ids += [SPECIAL["audio_eos"] if kind == "audio" else 107] + [1] * draw(st.integers(0, 3))
    return ids, placed, sounds


@settings(max_examples=100, deadline=None)
@given(st.booleans(), st.data())
def test_positions_equal_the_library(with_tracks: bool, data: Any) -> None:
    ids, placed, sounds = data.draw(prompts(with_tracks))
    expected, delta = expected_positions(meta_thinker(), ids, placed, sounds, with_tracks)
    positions, own_delta = rope_index(len(ids), placed, CLOCK)
    torch.testing.assert_close(positions.float(), expected.float(), rtol=0, atol=1e-4)
    assert own_delta == pytest.approx(float(delta), abs=1e-4)


def test_a_token_that_is_none_is_a_config_error(folder: Path, tmp_path: Path) -> None:
    config = tiny_config()
    config.thinker_config.audio_end_token_id = None
    config.save_pretrained(tmp_path)
    save_processor(tmp_path)
    with pytest.raises(ConfigError, match="thinker_config: audio_end_token_id: got None"):
        Qwen3OmniPromptReader(tmp_path, TextProcessor(folder).encode, LimitsConfig())
