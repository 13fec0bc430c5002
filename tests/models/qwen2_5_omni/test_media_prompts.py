"""Prompts with media equal those of transformers' processor: tokens, encoder inputs, places and positions."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soxr
import torch
from PIL import Image
from support.media import RATE, picture, plan_media, read_media, reference_processor, sound_bytes, tone, video_bytes
from support.media_prompts import called
from support.speech import PROCESSOR, SPECIAL, meta_thinker, save_readable
from support.versions import needs
from transformers import Qwen2_5OmniProcessor

from vllm_omni import Audio
from vllm_omni.config.schema import LimitsConfig
from vllm_omni.engine.ar.tokenizer import TextProcessor
from vllm_omni.errors import ConfigError
from vllm_omni.media.video_input import picked_frames
from vllm_omni.models.qwen2_5_omni.prompt_reader import OmniPromptReader
from vllm_omni.worker.ar.media_prompt import MediaPrompt
from vllm_omni.worker.ar.media_reading.audio_parts import VIDEO_TOKENS
from vllm_omni.worker.ar.media_reading.vision import VisionSettings

FACTOR = 8
WIDE = [picture(64, 136, seed) for seed in range(4)]  # 136 tokens: nothing is resized


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_readable(tmp_path_factory.mktemp("omni"))


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return reference_processor(folder)


@pytest.fixture(scope="module")
def media(folder: Path) -> OmniPromptReader:
    return OmniPromptReader(folder, TextProcessor(folder).encode, LimitsConfig())


def message(*parts: Any) -> list[dict[str, Any]]:
    """A question around the parts: (kind, source) or (kind, source, fps)."""
    content: list[dict[str, Any]] = [{"type": "text", "text": "See"}]
    for kind, source, *fps in parts:
        content.append({"type": kind, kind: source, **({"fps": fps[0]} if fps else {})})
    return [{"role": "user", "content": [*content, {"type": "text", "text": ", what?"}]}]


def kinds(prompt: MediaPrompt) -> list[str]:
    return [item.kind for item in prompt.items]


def check_equal(prompt: MediaPrompt, expected: Any, with_tracks: bool = False) -> None:
    """Tokens, encoder inputs, the placeholders of every item, and positions."""
    ids = expected["input_ids"][0].tolist()
    assert list(prompt.token_ids) == ids
    for kind in ("image", "video"):
        name = "pixel_values" if kind == "image" else "pixel_values_videos"
        items = [item.inputs for item in prompt.items if item.kind == kind]
        if items:
            torch.testing.assert_close(torch.cat([one["pixel_values"] for one in items]), expected[name])
            assert torch.equal(torch.stack([one["grid_thw"] for one in items]), expected[f"{kind}_grid_thw"])
    sounds = [item.inputs["features"] for item in prompt.items if item.kind == "audio"]
    seconds = [float(item.inputs["second_per_grid"]) for item in prompt.items if item.kind == "video"]
    lengths = None
    if sounds:
        lengths = expected["feature_attention_mask"].sum(-1)
        for own, theirs, length in zip(sounds, expected["input_features"], lengths, strict=True):
            torch.testing.assert_close(own, theirs[:, :length])
    if seconds:
        assert seconds == [float(value) for value in expected["video_second_per_grid"]]
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
    assert torch.equal(prompt.positions, positions[:, 0].long()) and prompt.position_delta == int(delta)


def test_text_alone_equals_the_reference(folder: Path, reference: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello\nyou"}]
    assert TextProcessor(folder).encode(messages) == called(reference, messages)["input_ids"][0].tolist()
    assert (
        TextProcessor(folder).encode("Hi")
        == called(reference, [{"role": "user", "content": "Hi"}])["input_ids"][0].tolist()
    )


@pytest.mark.parametrize("size", [(24, 40), (8, 8), (64, 64)])
def test_an_image_equals_the_reference(size: tuple[int, int], media: OmniPromptReader, reference: Any) -> None:
    messages = message(("image", picture(*size)))
    check_equal(read_media(media, messages), called(reference, messages, images=[Image.fromarray(picture(*size))]))


@pytest.mark.parametrize(
    "size",
    [(30, 50), pytest.param((9, 300), marks=needs("pillow", "13", "it rounds as torch does")), (200, 90), (11, 9)],
)
def test_a_resized_image_differs_by_no_more_than_a_grey_level(
    size: tuple[int, int], media: OmniPromptReader, reference: Any
) -> None:
    messages = message(("image", picture(*size)))
    expected = called(reference, messages, images=[Image.fromarray(picture(*size))])
    prompt = read_media(media, messages)
    assert list(prompt.token_ids) == expected["input_ids"][0].tolist()
    assert torch.equal(prompt.items[0].inputs["grid_thw"], expected["image_grid_thw"][0])
    difference = (prompt.items[0].inputs["pixel_values"] - expected["pixel_values"]).abs().max()
    assert difference <= 1.001 / 255 / min(PROCESSOR["image_std"])


@pytest.mark.parametrize("seconds", [0.03, 0.5, 1.234, 20.0])
def test_a_sound_equals_the_reference(seconds: float, media: OmniPromptReader, reference: Any) -> None:
    messages = message(("audio", (tone(seconds), RATE)))
    check_equal(read_media(media, messages), called(reference, messages, audio=[tone(seconds)[0]]))


@pytest.mark.parametrize("num_frames", [1, 2, 3, 4])
def test_frames_equal_the_reference(num_frames: int, media: OmniPromptReader, reference: Any) -> None:
    frames = np.stack(WIDE[:num_frames])
    messages = message(("video", frames))
    check_equal(read_media(media, messages), called(reference, messages, videos=[frames]))


def test_the_rate_of_frames_moves_the_positions_as_in_the_reference(media: OmniPromptReader, reference: Any) -> None:
    frames = np.stack(WIDE)
    messages = message(("video", frames, 0.8))
    check_equal(read_media(media, messages), called(reference, messages, videos=[frames], fps=0.8))


def decoded(content: bytes, indices: list[int]) -> np.ndarray[Any, Any]:
    import av

    with av.open(io.BytesIO(content)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack([frames[index] for index in indices])


def test_a_video_file_equals_the_reference(media: OmniPromptReader, reference: Any) -> None:
    content = video_bytes([*WIDE, *WIDE], fps=4)
    messages = message(("video", content))
    prompt = read_media(media, messages)
    check_equal(prompt, called(reference, messages, videos=[decoded(content, [0, 2, 4, 6])]))
    assert kinds(prompt) == ["video"]


@needs("transformers", "5.23", "it is asked for a video with its sound in another way before")
@pytest.mark.parametrize("seconds", [2.0, 2.5])
def test_a_video_with_its_sound_equals_the_reference(seconds: float, media: OmniPromptReader, reference: Any) -> None:
    content = video_bytes([*WIDE, *WIDE, *WIDE[: int(4 * seconds) - 8]], 4, tone(seconds, channels=2))
    messages = message(("video", content), ("audio", (tone(0.4), RATE)))
    prompt = read_media(media, messages, True)
    track, rate = sound_of(content)
    settings = VisionSettings.of(Path(str(reference.tokenizer.name_or_path))).frames
    indices = picked_frames(int(4 * seconds), 4, 2, settings)
    expected = called(
        reference,
        messages,
        videos=[decoded(content, list(indices))],
        audio=[track, tone(0.4)[0]],
        audio_from_video_indices=[0, None],
        load_audio_from_video=True,
    )
    assert rate == RATE and kinds(prompt) == ["video", "audio", "audio"]
    check_equal(prompt, expected, with_tracks=True)


def sound_of(content: bytes) -> tuple[np.ndarray[Any, Any], int]:
    import av

    with av.open(io.BytesIO(content)) as container:
        blocks = [frame.to_ndarray().mean(axis=0, dtype=np.float32) for frame in container.decode(audio=0)]
        return np.concatenate(blocks), container.streams.audio[0].rate


def test_a_mix_equals_the_reference(media: OmniPromptReader, reference: Any) -> None:
    images = [picture(24, 40), picture(16, 16, 3)]
    frames = np.stack(WIDE)
    sounds = [tone(0.3), tone(0.7)]
    parts = [("image", images[0]), ("audio", (sounds[0], RATE)), ("video", frames), ("image", images[1])]
    messages = message(*parts, ("audio", (sounds[1], RATE)))
    expected = called(
        reference,
        messages,
        images=[Image.fromarray(image) for image in images],
        audio=[sound[0] for sound in sounds],
        videos=[frames],
    )
    prompt = read_media(media, messages)
    check_equal(prompt, expected)
    assert kinds(prompt) == ["image", "audio", "video", "image", "audio"]


def test_media_of_several_messages_keep_their_order(media: OmniPromptReader, reference: Any) -> None:
    messages = [
        *message(("image", picture())),
        {"role": "assistant", "content": "A wave."},
        *message(("image", picture(16, 16))),
    ]
    expected = called(reference, messages, images=[Image.fromarray(picture()), Image.fromarray(picture(16, 16))])
    check_equal(read_media(media, messages), expected)


def test_every_kind_of_source_gives_the_same_prompt(media: OmniPromptReader, tmp_path: Path) -> None:
    pixels, samples = picture(), tone()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "a.wav").write_bytes(sound_bytes(samples))
    video = video_bytes(WIDE)
    (tmp_path / "a.mp4").write_bytes(video)
    groups = [
        ("image", [pixels, Image.fromarray(pixels), tmp_path / "a.png", (tmp_path / "a.png").read_bytes()]),
        ("image", [np.repeat(pixels[:, :, :1], 3, 2), pixels[:, :, 0], Image.fromarray(pixels[:, :, 0])]),
        (
            "audio",
            [
                (samples, RATE),
                {"array": samples[0], "sampling_rate": RATE},
                Audio(samples, RATE),
                str(tmp_path / "a.wav"),
                sound_bytes(samples),
            ],
        ),
        ("video", [str(tmp_path / "a.mp4"), video, decoded(video, [0, 1, 2, 3])]),
        ("video", [np.stack(WIDE), WIDE, [Image.fromarray(frame) for frame in WIDE]]),
    ]
    for kind, sources in groups:
        prompts = [read_media(media, message((kind, source))) for source in sources]
        for prompt in prompts[1:]:
            assert prompt.content_ids == prompts[0].content_ids and prompt.token_ids == prompts[0].token_ids


def test_a_stereo_sound_at_another_rate_is_mixed_and_resampled(media: OmniPromptReader, reference: Any) -> None:
    samples = tone(0.5, 22_050, channels=2)
    messages = message(("audio", (samples, 22_050)))
    mono = soxr.resample(samples.mean(axis=0), 22_050, RATE, quality="HQ")
    own = read_media(media, messages).items[0].inputs["features"]
    expected = called(reference, messages, audio=[mono])
    torch.testing.assert_close(own, expected["input_features"][0, :, : own.shape[1]], atol=1e-4, rtol=1e-4)


def test_a_picture_is_turned_as_its_file_asks(media: OmniPromptReader) -> None:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    Image.fromarray(picture(24, 40)).save(file, "PNG", exif=exif)
    turned = np.rot90(picture(24, 40), -1)
    own, expected = (read_media(media, message(("image", x))) for x in (file.getvalue(), np.ascontiguousarray(turned)))
    assert own.content_ids == expected.content_ids


def test_a_video_is_turned_as_its_file_asks(media: OmniPromptReader) -> None:
    content = video_bytes(WIDE)
    matrix = b"".join(n.to_bytes(4, "big") for n in (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30))
    quarter = b"".join((n % 2**32).to_bytes(4, "big") for n in (0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30))
    track = content.index(b"tkhd")
    place = content.index(matrix, track)
    turned = np.rot90(decoded(content, [0, 1, 2, 3]), -1, axes=(1, 2))
    own = read_media(media, message(("video", content[:place] + quarter + content[place + len(matrix) :])))
    assert own.content_ids == read_media(media, message(("video", np.ascontiguousarray(turned)))).content_ids


def test_content_ids_follow_the_content_alone(media: OmniPromptReader) -> None:
    def content(*parts: Any) -> list[int]:
        return list(read_media(media, message(*parts)).content_ids)

    first, again, other = (content(("image", picture(seed=seed))) for seed in (0, 0, 1))
    assert first == again and first != other
    media_ids = [token for token in first if token > 2**64]
    assert len(media_ids) == len(set(media_ids)) == 15
    assert [token for token in first if token < 2**64] == [token for token in other if token < 2**64]
    frames = np.stack(WIDE)
    assert content(("video", frames, 1.0)) != content(("video", frames, 2.0))  # other positions


def test_a_silent_video_needs_no_sound(media: OmniPromptReader) -> None:
    for source in (video_bytes(WIDE), np.stack(WIDE)):
        messages = message(("video", source))
        assert read_media(media, messages, True).token_ids == read_media(media, messages).token_ids


@pytest.mark.parametrize("use_audio_in_video", [False, True])
def test_the_check_counts_the_tokens_without_decoding(use_audio_in_video: bool, media: OmniPromptReader) -> None:
    video = video_bytes([*WIDE, *WIDE], 4, tone(2.0))
    messages = message(("image", picture(30, 50)), ("audio", (tone(0.77), RATE)), ("video", video))
    count = plan_media(media, messages, use_audio_in_video).num_tokens
    read = len(read_media(media, messages, use_audio_in_video).token_ids)
    assert abs(count - read) <= use_audio_in_video * 2  # a codec adds some samples to a sound track


@pytest.mark.parametrize(
    ("num_frames", "source_fps", "fps"),
    [(1, 30, 2), (2, 30, 2), (3, 30, 2), (7, 30, 2), (100, 30, 2), (101, 29.97, 2), (5000, 10, 2), (60, 1, 2)],
)
def test_frames_are_picked_as_the_reference_does(num_frames: int, source_fps: float, fps: float, folder: Path) -> None:
    settings = VisionSettings.of(folder).frames
    picked = list(picked_frames(num_frames, source_fps, fps, settings))
    if num_frames >= 2:
        most = min(768, num_frames) // 2 * 2
        wanted = min(max(num_frames / source_fps * fps, 4), most) // 2 * 2
        assert picked == torch.arange(0, num_frames, num_frames / wanted).int().tolist()
    assert picked[0] == 0 and sorted(set(picked)) == picked and picked[-1] < num_frames


@needs("transformers", "5.23", "it states the published size")
def test_a_video_keeps_the_published_size_of_frames(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, "patch_size": 14}))
    video = VisionSettings.of(tmp_path, VIDEO_TOKENS).video
    size = Qwen2_5OmniProcessor.videos_kwargs["size"]
    assert (video.min_pixels, video.max_pixels) == (size["shortest_edge"], size["longest_edge"])


def test_settings_are_read_from_the_joint_file_as_well(folder: Path, tmp_path: Path) -> None:
    kind = {"size": {"shortest_edge": 64, "longest_edge": 4096}}
    section = {key: PROCESSOR[key] for key in ("image_mean", "image_std", "patch_size")} | kind
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"image_processor": section, "video_processor": section})
    )
    assert VisionSettings.of(tmp_path) == VisionSettings.of(folder)


@pytest.mark.parametrize(("key", "value"), [("do_resize", False), ("resample", 2)])
def test_another_way_of_processing_is_refused(key: str, value: object, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, key: value}))
    with pytest.raises(ConfigError, match=key):
        VisionSettings.of(tmp_path)
