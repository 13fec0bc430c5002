"""Pictures and sounds as bytes: whole and as a stream, and what the files say of how they were made, read back by our
own reader and by the libraries that other programs use.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.media import picture, tone

from vllm_omni import Audio
from vllm_omni.errors import InvalidRequestError
from vllm_omni.media.audio_encoding import AUDIO_FORMATS, STREAM_FORMATS, AudioStream, encode_audio
from vllm_omni.media.file_info import read_file_info
from vllm_omni.media.image_encoding import IMAGE_FORMATS, encode_image
from vllm_omni.media.metadata import VERSION, MediaMetadata

RATE = 24_000
MADE = MediaMetadata(
    prompt='a cat, "quoted": 日本\nSteps: none',
    negative_prompt="dog, blue\nfrog",
    seed=2**63 - 1,
    model="owner/name",
    version=VERSION,
    parameters={"num_inference_steps": 9, "guidance_scale": 1.5, "size": "40x24", "lyrics": "la, la", "bpm": 90},
)


def decoded(content: bytes) -> np.ndarray[Any, Any]:
    """[channels, n] as FFmpeg decodes it, integers as they are stored."""
    with av.open(io.BytesIO(content)) as container:
        frames = list(container.decode(audio=0))
    channels = frames[0].layout.nb_channels
    blocks = [frame.to_ndarray() for frame in frames]
    packed = not frames[0].format.is_planar
    return np.concatenate([block.reshape(-1, channels).T if packed else block for block in blocks], axis=1)


def in_pieces(stream: AudioStream, samples: np.ndarray[Any, Any], sizes: list[int]) -> list[bytes]:
    pieces, start = [], 0
    for size in sizes:
        pieces.append(stream.write(samples[:, start : start + size]))
        start += size
    return [*pieces, stream.write(samples[:, start:]), stream.close()]


def written(tmp_path: Path, content: bytes, suffix: str) -> Path:
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content)
    return path


# Pictures


@pytest.mark.parametrize("form", IMAGE_FORMATS)
def test_a_picture_says_how_it_was_made_in_every_format(form: str, tmp_path: Path) -> None:
    image = Image.fromarray(picture())
    content = encode_image(image, form, metadata=MADE)
    found = Image.open(io.BytesIO(content))
    assert found.size == image.size
    assert np.abs(np.asarray(found.convert("RGB")).astype(int) - picture()).mean() < 3
    info = read_file_info(written(tmp_path, content, f".{form}"))
    assert info.metadata == MADE and info.content == f"{form.upper()} image, 40x24"
    assert read_file_info(written(tmp_path, encode_image(image, form), f".{form}")).metadata is None


def test_the_fields_are_those_that_other_programs_read() -> None:
    image = Image.new("RGB", (8, 8))
    found = Image.open(io.BytesIO(encode_image(image, "png", metadata=MADE)))
    assert found.text["parameters"] == MADE.to_text()  # type: ignore[attr-defined]
    for form in ("jpeg", "webp"):
        exif = Image.open(io.BytesIO(encode_image(image, form, metadata=MADE))).getexif()
        comment = exif.get_ifd(0x8769)[0x9286]
        assert comment[:8] == b"UNICODE\0" and comment[8:].decode("utf-16-be") == MADE.to_text()
    last = MADE.to_text().split("\n")[-1]
    assert last.startswith("Steps: 9, CFG scale: 1.5, Seed: 9223372036854775807, Size: 40x24, ")
    assert MADE.to_text().split("\n")[2] == "Negative prompt: dog, blue"


def test_a_jpeg_has_no_room_for_everything_and_still_says_the_rest(tmp_path: Path) -> None:
    long = MediaMetadata(prompt="日" * 100_000, seed=7, version=VERSION)
    content = encode_image(Image.new("RGB", (8, 8)), "jpeg", metadata=long)
    found = read_file_info(written(tmp_path, content, ".jpg")).metadata
    assert found is not None and found.seed == 7 and found.prompt == "日" * 5_000
    whole = read_file_info(written(tmp_path, encode_image(Image.new("RGB", (8, 8)), "png", metadata=long), ".png"))
    assert whole.metadata is not None and whole.metadata.prompt == long.prompt


def test_what_a_jpeg_cannot_show_through_is_white_and_other_formats_keep_it() -> None:
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert Image.open(io.BytesIO(encode_image(clear, "jpeg"))).getpixel((3, 3)) == (255, 255, 255)
    for form in ("png", "webp", "tiff", "avif"):
        assert Image.open(io.BytesIO(encode_image(clear, form))).getpixel((3, 3))[3] == 0  # type: ignore[index]


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_a_premultiplied_picture_is_written_as_the_plain_one(mode: str) -> None:
    plain = Image.new("RGBA", (4, 4), (255, 0, 0, 51)).convert(mode)
    premultiplied = plain.convert({"LA": "La", "RGBA": "RGBa"}[mode])
    for form in IMAGE_FORMATS:
        assert encode_image(premultiplied, form) == encode_image(premultiplied.convert(mode), form), form
    with Image.open(io.BytesIO(encode_image(premultiplied, "png"))) as image:
        assert image.mode == mode and image.getpixel((0, 0))[-1] == 51


def test_quality_is_a_number_for_formats_that_lose_something() -> None:
    image = Image.fromarray(picture(120, 200))
    for form in ("jpeg", "webp", "avif"):
        assert len(encode_image(image, form, quality=10)) < len(encode_image(image, form))
    for form, quality, words in (
        ("png", 90, "quality: got 90, but png loses nothing"),
        ("jpeg", -1, "quality: got -1, expected at least 0 and at most 100"),
        ("jpeg", "high", "quality: got 'high', expected an integer"),
    ):
        with pytest.raises(InvalidRequestError, match=words):
            encode_image(image, form, quality=quality)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match=r"format: got 'jpg' \(did you mean 'jpeg'\?\)"):
        encode_image(image, "jpg")
    with pytest.raises(InvalidRequestError, match="webp: a picture of 16384x1 pixels, mode RGB, cannot be written"):
        encode_image(Image.new("RGB", (16_384, 1)), "webp")


# Metadata as text


words = st.text(st.characters(exclude_characters="\0\r", exclude_categories=["Cs"]), min_size=1).filter(
    lambda text: "Negative prompt:" not in text and not text.startswith(" ")
)
names = st.from_regex(r"[a-z][a-z_]{0,10}", fullmatch=True).filter(
    lambda name: name not in ("seed", "model", "version")
)
values = words | st.integers() | st.booleans() | st.floats(allow_nan=False) | st.lists(st.integers(), max_size=4)


@given(words, st.none() | words, st.integers(0, 2**63 - 1), st.dictionaries(names, values))
def test_text_is_read_back_as_it_was_written(
    prompt: str, negative: str | None, seed: int, parameters: dict[str, Any]
) -> None:
    made = MediaMetadata(
        prompt=prompt, negative_prompt=negative, seed=seed, model="a/b", version=VERSION, parameters=parameters
    )
    found = MediaMetadata.parse(made.to_text())
    assert (found.prompt, found.negative_prompt, found.seed) == (prompt, negative, seed)
    assert {name: found.parameters[name] for name in parameters} == {
        name: value for name, value in parameters.items() if name in found.parameters
    }
    assert all(len(str(parameters[name])) > 100 for name in parameters.keys() - found.parameters.keys())


def test_what_others_have_written_is_read(tmp_path: Path) -> None:
    text = (
        "masterpiece, a (red:1.2) barn\nNegative prompt: blurry\n"
        "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 965400086, Size: 512x768, Model hash: e1441589a6, Model: v1-5"
    )
    found = MediaMetadata.parse(text)
    assert found.prompt == "masterpiece, a (red:1.2) barn" and found.negative_prompt == "blurry"
    assert (found.seed, found.model, found.version) == (965400086, "v1-5", None)
    assert found.parameters["sampler"] == "Euler a" and found.parameters["num_inference_steps"] == 20
    assert MediaMetadata.parse("only words, seed: 7").prompt == "only words, seed: 7"
    image, chunks = Image.new("RGB", (2, 2)), io.BytesIO()
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0" + text.encode()
    image.save(chunks, "JPEG", exif=exif.tobytes())
    assert read_file_info(written(tmp_path, chunks.getvalue(), ".jpg")).metadata == found


def test_odd_characters_do_not_keep_a_file_from_being_written(tmp_path: Path) -> None:
    odd = MediaMetadata(prompt="a\0b\udc80", seed=1, version=VERSION)
    for form in ("png", "jpeg"):
        content = encode_image(Image.new("RGB", (2, 2)), form, metadata=odd)
        found = read_file_info(written(tmp_path, content, f".{form}")).metadata
        assert found is not None and found.prompt == "ab\\udc80" and found.seed == 1
    for form in ("wav", "flac", "ogg", "mp3", "opus", "aac"):
        found = read_file_info(written(tmp_path, encode_audio(sound(), form, metadata=odd), f".{form}")).metadata
        assert found is not None and found.prompt == "ab\\udc80" and found.seed == 1


# Sounds


def sound(seconds: float = 0.5, rate: int = RATE, channels: int = 1) -> Audio:
    return Audio(tone(seconds, rate, channels), rate)


@pytest.mark.parametrize("form", [form for form in AUDIO_FORMATS if form != "pcm"])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_sound_says_how_it_was_made_and_sounds_the_same(form: str, channels: int, tmp_path: Path) -> None:
    audio = sound(channels=channels)
    content = encode_audio(audio, form, metadata=MADE)
    info = read_file_info(written(tmp_path, content, AUDIO_FORMATS[form].suffix))
    assert info.metadata == MADE and f"{channels} channels" in info.content
    heard = soundfile.read(io.BytesIO(content), always_2d=True)[0].T if form == "ogg" else decoded(content)
    rate = 48_000 if form == "opus" else RATE  # whatever the encoder's rate, Opus decodes at this one
    assert heard.shape[0] == channels and 0 <= heard.shape[1] / rate - audio.duration_s < 0.1
    spectrum = np.abs(np.fft.rfft(heard[0].astype(float)))
    assert abs(spectrum.argmax() * rate / heard.shape[1] - 330) < 3


@pytest.mark.parametrize("form", STREAM_FORMATS)
@pytest.mark.parametrize("sizes", [[], [1] * 30, [4000, 4000], [0, 7000, 0, 1]])
def test_the_pieces_of_a_stream_are_the_whole(form: str, sizes: list[int], tmp_path: Path) -> None:
    samples = tone(0.5, RATE, 2)
    whole = encode_audio(Audio(samples, RATE), form, metadata=MADE)
    pieces = in_pieces(AudioStream(form, RATE, 2, metadata=MADE), samples, sizes)
    joined = b"".join(pieces)
    if form == "pcm":
        assert joined == whole and np.array_equal(
            np.frombuffer(whole, "<i2").reshape(-1, 2).T, np.rint(samples * 2**15)
        )
        return
    assert read_file_info(written(tmp_path, joined, AUDIO_FORMATS[form].suffix)).metadata == MADE
    if form == "mp3":  # only a whole file says how much its encoder has put before and behind the sound
        ours, theirs = decoded(joined), decoded(whole)
        lag = next(k for k in range(3000) if np.abs(ours[:, k : k + 4000] - theirs[:, :4000]).max() < 1e-4)
        assert lag == 1105 and ours.shape[1] >= lag + theirs.shape[1]
    else:
        assert np.array_equal(decoded(joined), decoded(whole))


@pytest.mark.parametrize("form", STREAM_FORMATS)
def test_a_stream_gives_bytes_while_it_is_made(form: str) -> None:
    samples, stream = tone(4.0), AudioStream(form, 16_000, 1)
    sizes = [len(stream.write(samples[:, start : start + 3_200])) for start in range(0, samples.shape[1], 3_200)]
    assert all(sizes[index] + sizes[index + 1] > 0 for index in range(len(sizes) - 1)), sizes
    stream.close()


def test_a_stream_of_wav_says_no_length_and_nothing_comes_after_the_end() -> None:
    stream = AudioStream("wav", RATE, 1)
    head = stream.write(tone(0.1, RATE))
    assert head[4:8] == b"\xff" * 4 and head[head.index(b"data") + 4 :][:4] == b"\xff" * 4
    stream.close()
    assert stream.close() == b""
    with pytest.raises(InvalidRequestError, match="after the end of the stream"):
        stream.write(tone(0.1, RATE))


@pytest.mark.parametrize("form", STREAM_FORMATS)
def test_a_stream_of_nothing_is_a_file_of_no_length(form: str) -> None:
    content = AudioStream(form, RATE, 1).close()
    assert content[:3] == {"pcm": b"", "wav": b"RIF", "flac": b"fLa", "opus": b"Ogg"}.get(form, b"ID3")


def test_lossless_formats_keep_every_bit_that_they_have() -> None:
    loud = np.array([[1.0, -1.0, 1.5, -1.5, 0.25, 2**-15, 0.0, 2**-22]], np.float32)
    wav, _ = soundfile.read(io.BytesIO(encode_audio(Audio(loud, RATE), "wav")), dtype="int16")
    assert wav.tolist() == [32767, -32768, 32767, -32768, 8192, 1, 0, 0]
    flac, _ = soundfile.read(io.BytesIO(encode_audio(Audio(loud, RATE), "flac")), dtype="int32")
    assert (flac >> 8).tolist() == [2**23 - 1, -(2**23), 2**23 - 1, -(2**23), 2**21, 2**8, 0, 2]


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 37_800, 96_000, 192_000])
@pytest.mark.parametrize("form", ["mp3", "opus", "aac"])
def test_any_rate_is_written_and_keeps_its_pitch(form: str, rate: int) -> None:
    heard = decoded(encode_audio(sound(1.0, rate), form))
    with av.open(io.BytesIO(encode_audio(sound(1.0, rate), form))) as container:
        made = container.streams.audio[0].rate
    spectrum = np.abs(np.fft.rfft(heard[0]))
    assert abs(spectrum.argmax() * made / heard.shape[1] - 330) < 3


def test_what_a_format_does_not_hold_is_refused_in_words() -> None:
    for form in ("mp3", "opus", "aac"):
        with pytest.raises(InvalidRequestError, match=f"{form}: got 3 channels, expected 1 or 2"):
            encode_audio(sound(channels=3), form)
    with pytest.raises(InvalidRequestError, match=r"format: got 'ogg' .*known: wav, flac|format: got 'ogg'"):
        AudioStream("ogg", RATE, 1)
    with pytest.raises(InvalidRequestError, match=r"format: got 'm4a'"):
        encode_audio(sound(), "m4a")
    with pytest.raises(InvalidRequestError, match="sample_rate: got 7"):
        AudioStream("wav", 7, 1)
    with pytest.raises(InvalidRequestError, match=r"samples: got float32 \[2, 10\], expected float32 \[1, n\]"):
        AudioStream("wav", RATE, 1).write(np.zeros((2, 10), np.float32))
    with pytest.raises(InvalidRequestError, match=r"samples: got float64"):
        AudioStream("wav", RATE, 1).write(np.zeros((1, 10)))


def test_a_sound_saves_itself_in_every_format(tmp_path: Path) -> None:
    for form in AUDIO_FORMATS.values():
        sound().save(tmp_path / f"x{form.suffix}")
        assert (tmp_path / f"x{form.suffix}").stat().st_size > 500
