"""What a prompt with media must not be: each mistake is said with what was got and what was expected, and limits are
compared with headers before anything is decoded.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from support.media import (
    RATE,
    image_bytes,
    picture,
    plan_media,
    read_media,
    sound_bytes,
    sound_file_bytes_in_mp4,
    tone,
    video_bytes,
)
from support.speech import save_readable

from vllm_omni.config.schema import LimitsConfig, OmniConfig
from vllm_omni.engine.ar.options import AROptions
from vllm_omni.engine.ar.prompt import ARInput, ARLimits, PlannedPrompt, PreparedPrompt
from vllm_omni.engine.ar.tokenizer import TextProcessor
from vllm_omni.errors import CheckpointError, ConfigError, InvalidRequestError, ResourceError
from vllm_omni.models.qwen2_5_omni.prompt_reader import OmniPromptReader
from vllm_omni.params import SamplingParams
from vllm_omni.request import OmniRequest

LIMITS = LimitsConfig(
    max_image_pixels=100_000, max_images=3, max_video_s=10.0, max_video_frames=30, max_video_mb=1.0, max_audio_s=15.0
)
ADDRESS = re.compile(r"\b0x[0-9a-f]{4}")
FRAMES = [picture(64, 136, seed) for seed in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_readable(tmp_path_factory.mktemp("omni"))


@pytest.fixture(scope="module")
def text(folder: Path) -> TextProcessor:
    return TextProcessor(folder)


@pytest.fixture(scope="module")
def media(folder: Path, text: TextProcessor) -> OmniPromptReader:
    return OmniPromptReader(folder, text.encode, LIMITS)


def no_stop() -> None:
    """Somebody always wants the result."""


def words(value: object) -> str:
    return value[:50] if isinstance(value, str) else ""


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def part(kind: str, source: Any, **others: Any) -> dict[str, Any]:
    return {"type": kind, kind: source, **others}


def refusal(media: OmniPromptReader, messages: Any, use_audio_in_video: bool = True) -> str:
    """The message of the plan, for which nothing is decoded."""
    with pytest.raises(InvalidRequestError) as caught:
        plan_media(media, messages, use_audio_in_video)
    assert not ADDRESS.search(str(caught.value)) and str(caught.value).startswith("messages")
    return str(caught.value)


def late_refusal(media: OmniPromptReader, messages: Any) -> str:
    """The message of what shows only when it is decoded."""
    plan = plan_media(media, messages, True)
    assert plan.num_tokens > 0
    with pytest.raises(InvalidRequestError) as caught:
        media.read(plan, no_stop)
    assert not ADDRESS.search(str(caught.value)) and str(caught.value).startswith("messages")
    return str(caught.value)


def png_header(width: int, height: int) -> bytes:
    """A PNG that ends behind its header: whoever decodes it fails otherwise."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 100) + b"IDAT"


def wav_header(seconds: float) -> bytes:
    size = int(seconds * RATE) * 2
    head = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, RATE, RATE * 2, 2, 16) + struct.pack("<4sI", b"data", size)
    return b"RIFF" + struct.pack("<I", size + 36) + b"WAVE" + head


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (png_header(30_000, 30_000), "got an image so large that it is taken for an attack, expected at most 100000"),
        (png_header(1000, 101), "got 1000x101 pixels, expected at most 100000 in all (limits.max_image_pixels)"),
        (np.zeros((101, 1000, 3), np.uint8), "got 1000x101 pixels, expected at most 100000 in all"),
        (Image.new("RGB", (1000, 101)), "got 1000x101 pixels, expected at most 100000 in all"),
        (picture(8, 1700), "expected sides that differ at most 200 times"),
        (b"", "got a file that is no whole image, expected PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "got a file that is no whole image"),
        (sound_bytes(tone()), "got a file that is no whole image"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 9, "got a file that is no whole image"),
        ("https://example.org/a.png", "an address, and nothing is fetched; expected a path or bytes"),
        ("data:image/png;base64,AAAA", "got a file that is no whole image"),
        ("nowhere.png", "which cannot be read (No such file or directory); expected an image file"),
        ("/dev/zero", "a folder or a device, expected an image file"),
        (7, "got int, expected a path, a data URI, the bytes of a file, a PIL image or a numpy array"),
        (np.zeros((16, 16, 4), np.uint8), "got an array uint8 [16, 16, 4], expected uint8 [height, width, 3]"),
        (np.zeros((16, 16, 3), np.float32), "got an array float32 [16, 16, 3], expected uint8"),
        (np.zeros((0, 16, 3), np.uint8), "got 16x0 pixels, expected at least one"),
    ],
    ids=words,
)
def test_what_is_no_good_image_is_refused_before_it_is_decoded(
    source: Any, expected: str, media: OmniPromptReader
) -> None:
    assert expected in refusal(media, user(part("image", source)))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (sound_bytes(np.empty((1, 0), np.float32)), "got a sound of no length, expected at least one sample"),
        (wav_header(36_000.0), "got 36000.00 s, expected at most 15 s (limits.max_audio_s); cut it"),
        ((tone(0.01), RATE), "got 0.010 s of sound, expected at least 0.03 s, one token of the model"),
        (image_bytes(picture()), "got a file that is no sound"),
        ("http://example.org/a.wav", "an address, and nothing is fetched"),
        (sound_bytes(tone())[:2000], "got a truncated file"),
    ],
    ids=words,
)
def test_what_is_no_good_sound_is_refused_before_it_is_decoded(
    source: Any, expected: str, media: OmniPromptReader
) -> None:
    assert expected in refusal(media, user(part("audio", source)))


def test_a_sound_longer_than_the_encoder_hears_is_refused(folder: Path, text: TextProcessor) -> None:
    media = OmniPromptReader(folder, text.encode, LimitsConfig())
    said = refusal(media, user(part("audio", (tone(20.5), RATE))))
    assert "got 20.50 s of sound, expected at most 20 s, what the model hears in one piece" in said


def cut(content: bytes, share: float) -> bytes:
    return content[: int(len(content) * share)]


SOUNDING = video_bytes(FRAMES, 4, tone(1.0))
NOISE = np.random.default_rng(0).integers(0, 255, (20, 64, 136, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (lambda: video_bytes(FRAMES * 8), "got 32 frames, expected at most 30 (limits.max_video_frames); cut it"),
        (lambda: video_bytes(FRAMES * 6, fps=2), "got 12.00 s, expected at most 10 s (limits.max_video_s); cut it"),
        (lambda: np.zeros((30, 64, 136, 3), np.uint8), "got 15.00 s, expected at most 10 s"),
        (lambda: [picture(16, 16)] * 31, "got 31 frames, expected at most 30"),
        (lambda: bytes(2**20 + 1), "got 1.0 MB, expected at most 1 (limits.max_video_mb)"),
        (lambda: np.zeros((10, 200, 200, 3), np.uint8), "got 1.1 MB, expected at most 1 (limits.max_video_mb)"),
        (lambda: video_bytes([picture(400, 400)]), "got 400x400 pixels, expected at most 100000"),
        (lambda: np.zeros((0, 64, 136, 3), np.uint8), "got a video without frames, expected at least one"),
        (lambda: [], "got a video without frames"),
        (lambda: [picture(16, 16), picture(16, 24)], "got frames of 2 sizes, expected one size"),
        (lambda: ["a.png"], "[0]: got str, expected a PIL image or a numpy array"),
        (lambda: np.zeros((2, 3, 64, 136), np.uint8), "expected uint8 [frames, height, width, 3]"),
        (lambda: sound_file_bytes_in_mp4(tone()), "got a file without pictures, expected a video"),
        (lambda: image_bytes(picture()), "got a file that is no whole video"),
        (lambda: cut(video_bytes(FRAMES), 0.5), "got a file that is no whole video"),
        (lambda: b"#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n", "got a file that is no whole video"),
        (lambda: b"ffconcat version 1.0\nfile '/etc/passwd'\n", "got a file that is no whole video"),
        (lambda: video_bytes(FRAMES).replace(b"avc1", b"zzzz"), "got a video of an unknown codec"),
        (
            lambda: SOUNDING.replace(b"mp4a", b"zzzz").replace(b"esds", b"zzzz"),
            "got a video with sound of an unknown codec",
        ),
        (lambda: "https://example.org/a.mp4", "an address, and nothing is fetched"),
        (lambda: "rtsp://example.org/a", "an address, and nothing is fetched"),
        (lambda: "/tmp", "a folder or a device, expected a video file"),
        (lambda: 3.0, "got float, expected a path, the bytes of a file, a list of frames"),
    ],
    ids=words,
)
def test_what_is_no_good_video_is_refused_before_it_is_decoded(
    source: Callable[[], Any], expected: str, media: OmniPromptReader
) -> None:
    assert expected in refusal(media, user(part("video", source())))


def test_a_video_whose_sound_is_too_long_is_refused(folder: Path, text: TextProcessor) -> None:
    media = OmniPromptReader(folder, text.encode, LimitsConfig(max_audio_s=1.0))
    messages = user(part("video", video_bytes(FRAMES * 2, 4, tone(2.0))))
    said = refusal(media, messages)
    assert "of sound in a video, expected at most 1 s (limits.max_audio_s)" in said
    assert plan_media(media, messages, False).num_tokens > 0


@pytest.mark.parametrize(
    ("kind", "source", "expected"),
    [
        ("image", cut(image_bytes(NOISE[0]), 0.6), "got an image that is damaged or truncated"),
        ("image", png_header(100, 100), "got an image that is damaged or truncated"),
        ("image", cut(image_bytes(NOISE[0], "JPEG"), 0.6), "got an image that is damaged or truncated"),
        ("video", cut(video_bytes(list(NOISE), options={"movflags": "faststart"}), 0.5), "truncated"),
        ("audio", (np.full((1, RATE), np.nan, np.float32), RATE), "got samples that are NaN or infinite"),
    ],
    ids=words,
)
def test_a_damaged_file_is_refused_when_it_is_read(
    kind: str, source: Any, expected: str, media: OmniPromptReader
) -> None:
    assert expected in late_refusal(media, user(part(kind, source)))


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([part("image", picture())] * 4, "got 4 images, expected at most 3 (limits.max_images)"),
        (["words"], "messages[0].content[0]: got str, expected a mapping with 'type'"),
        ([{"image": b""}], "messages[0].content[0]: got the keys ['image'], expected a mapping with 'type'"),
        ([{"type": "image_url", "image_url": {}}], "got the type 'image_url' (did you mean 'image'?)"),
        ([{"type": "image"}], "messages[0].content[0]: got the type 'image' without 'image'"),
        ([{"type": "text", "text": 3}], "messages[0].content[0].text: got int, expected a string"),
        ([part("audio", tone(), rate=RATE)], "messages[0].content[0]: unknown key 'rate'"),
        ([part("image", picture(), fps=2)], "messages[0].content[0]: unknown key 'fps'"),
        ([part("video", FRAMES, fps=0)], "messages[0].content[0].fps: got 0, expected more than 0"),
        ([part("text", "<|IMAGE|>"), part("image", picture())], "got the media ['image'], but placeholders for"),
        ([part("text", "<|AUDIO|>")], "got the media [], but placeholders for ['audio']"),
    ],
    ids=words,
)
def test_messages_that_make_no_sense_are_refused(parts: list[Any], expected: str, media: OmniPromptReader) -> None:
    assert expected in refusal(media, user(*parts))


def ar_input(
    text: TextProcessor, media: OmniPromptReader | None, model_len: int = 400, pool_tokens: int = 512
) -> ARInput:
    limits = ARLimits(
        vocab_size=128,
        model_len=model_len,
        pool_tokens=pool_tokens,
        pool_limited_by="num_blocks",
        max_prompt_chars=1000,
        max_outputs=4,
    )
    return ARInput(AROptions(part="thinker"), text, limits, media)


def prepared(stage: ARInput, prompt: Any, params: SamplingParams | None = None, **fields: Any) -> PreparedPrompt:
    """Planned and read."""
    given = params or SamplingParams()
    found = stage.prepare(prompt, OmniRequest(prompt=prompt, fields=fields), given)
    return stage.read(found, given, no_stop) if isinstance(found, PlannedPrompt) else found


def test_a_prompt_with_media_is_prepared_with_room_for_an_answer(text: TextProcessor, media: OmniPromptReader) -> None:
    stage = ar_input(text, media)
    messages = user(part("image", picture()), part("text", "What?"))
    planned = stage.prepare(messages, OmniRequest(prompt=messages), SamplingParams())
    found = prepared(stage, messages, SamplingParams(max_tokens=50))
    assert found.media is not None and found.token_ids == list(found.media.token_ids)
    assert planned.num_tokens == found.num_tokens
    assert found.max_new_tokens == 50 and found.num_truncated == 0
    assert prepared(stage, messages).max_new_tokens == 400 - found.num_tokens


def test_text_parts_are_text(text: TextProcessor, media: OmniPromptReader) -> None:
    parts, plain = user(part("text", "Hello "), part("text", "you")), [{"role": "user", "content": "Hello you"}]
    for stage in (ar_input(text, media), ar_input(text, None)):
        found = prepared(stage, parts)
        assert found == prepared(stage, plain) and found.media is None


def test_a_stage_that_reads_text_names_the_part_that_it_cannot_read(text: TextProcessor) -> None:
    stage = ar_input(text, None)
    with pytest.raises(InvalidRequestError, match=r"content\[1\]: got a part of type 'audio', expected only 'text'"):
        prepared(stage, user(part("text", "Hi"), part("audio", (tone(), RATE))))


def test_media_beyond_the_context_are_refused_before_they_are_decoded(
    text: TextProcessor, media: OmniPromptReader
) -> None:
    stage = ar_input(text, media, model_len=100)
    messages = user(part("image", png_header(64, 64)))  # 64 tokens, and pixels that nobody could decode
    with pytest.raises(InvalidRequestError, match=r"tokens with their media, expected at most 99 \(max_model_len\)"):
        prepared(stage, messages)


def test_media_beyond_the_pool_are_refused(text: TextProcessor, media: OmniPromptReader) -> None:
    with pytest.raises(ResourceError, match="the whole KV pool"):
        prepared(ar_input(text, media, pool_tokens=32), user(part("image", picture())))


def test_a_text_beyond_the_limits_is_refused_whatever_media_come_with_it(
    text: TextProcessor, media: OmniPromptReader
) -> None:
    stage = ar_input(text, media)
    with pytest.raises(InvalidRequestError, match="got 1001 characters, expected at most 1000"):
        prepared(stage, user(part("text", "x" * 1001), part("image", picture())))
    with pytest.raises(InvalidRequestError, match="expected at most 399"):
        prepared(stage, user(part("text", "x" * 600), part("image", picture())))
    with pytest.raises(InvalidRequestError, match="expected at most 399"):
        prepared(stage, user(part("text", "x" * 600)))


def test_placeholders_without_media_are_refused(text: TextProcessor, media: OmniPromptReader) -> None:
    for prompt in ([1, 101, 2], "a <|IMAGE|>", [{"role": "user", "content": "<|IMAGE|>"}]):
        with pytest.raises(InvalidRequestError, match="the token id 101, which stands for media"):
            prepared(ar_input(text, media), prompt)


def test_use_audio_in_video_is_read_from_the_request(text: TextProcessor, media: OmniPromptReader) -> None:
    stage = ar_input(text, media, 600, 600)
    messages = user(part("video", video_bytes(FRAMES * 2, 4, tone(2.0))))
    lengths = []
    for value in (True, False, None):
        lengths.append(prepared(stage, messages, use_audio_in_video=value).num_tokens)
    assert lengths[0] > lengths[1] == lengths[2]
    with pytest.raises(InvalidRequestError, match="use_audio_in_video: got 'yes', expected true or false"):
        prepared(stage, "words alone", use_audio_in_video="yes")


def test_a_message_without_a_role_is_described_by_its_keys() -> None:
    with pytest.raises(InvalidRequestError, match=r"prompt\[0\]: got the keys \['content'\], expected 'role'"):
        OmniRequest(prompt=[{"content": [part("image", Image.new("RGB", (8, 8)))]}])


def test_another_model_is_no_folder_for_media(tmp_path: Path, text: TextProcessor) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        OmniPromptReader(tmp_path, text.encode, LIMITS)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(ConfigError, match="got a qwen3, expected qwen2_5_omni"):
        OmniPromptReader(tmp_path, text.encode, LIMITS)


@pytest.mark.parametrize("key", ["max_image_pixels", "max_video_s", "max_video_frames", "max_video_mb"])
def test_limits_are_positive_numbers(key: str) -> None:
    with pytest.raises(ConfigError, match=f"limits.{key}: got 0"):
        OmniConfig(limits=LimitsConfig(**{key: 0})).validate()


@pytest.mark.parametrize("options", [{}, {"live": "1"}])
def test_a_webm_that_counts_no_frames_is_read(options: dict[str, str], media: OmniPromptReader) -> None:
    content = video_bytes(
        FRAMES, form="webm", sound=tone(1.0, 48_000), sound_rate=48_000, options=options
    )  # a live one does not say how long it is either
    prompt = read_media(media, user(part("video", content)), True)
    assert [item.kind for item in prompt.items] == ["video", "audio"]
    assert prompt.items[0].inputs["grid_thw"].tolist()[0] == 2


ORIGINALS = {
    "image": image_bytes(picture(24, 24)),
    "audio": sound_bytes(tone(0.05)),
    "video": video_bytes(FRAMES[:2], 2, tone(0.5)),
}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(sorted(ORIGINALS)),
    flips=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6),
    share=st.sampled_from([1.0, 1.0, 0.99, 0.7, 0.1]),
)
def test_a_file_with_wrong_bytes_is_read_or_refused(
    kind: str, flips: list[tuple[float, int]], share: float, media: OmniPromptReader
) -> None:
    content = bytearray(cut(ORIGINALS[kind], share))
    for place, value in flips:
        content[int(place * (len(content) - 1))] = value
    messages = user(part(kind, bytes(content)))
    try:
        read_media(media, messages, True)
    except InvalidRequestError as error:
        assert not ADDRESS.search(str(error))
