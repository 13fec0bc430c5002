"""Small real files with pictures, sound and both, and transformers' own processor to compare with."""

from __future__ import annotations

import io
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import numpy as np
import soundfile
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, Qwen2_5OmniProcessor, WhisperFeatureExtractor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import is_torchvision_available

from vllm_omni.media.messages import media_parts, without_sources
from vllm_omni.models.qwen2_5_omni.prompt_reader import OmniPromptReader
from vllm_omni.request import OmniRequest
from vllm_omni.worker.ar.chat import Chat
from vllm_omni.worker.ar.media_prompt import MediaPrompt
from vllm_omni.worker.ar.media_reading.reader import MediaPromptPlan

RATE = 16_000


def plan_media(reader: OmniPromptReader, messages: Any, use_audio_in_video: bool = False) -> MediaPromptPlan:
    """What headers say of the messages."""
    request = OmniRequest(prompt="unread", fields={"use_audio_in_video": use_audio_in_video})
    parts = media_parts(messages)
    return reader.plan(Chat(without_sources(messages)), parts, request)


def read_media(reader: OmniPromptReader, messages: Any, use_audio_in_video: bool = False) -> MediaPrompt:
    """The messages, read."""
    return reader.read(plan_media(reader, messages, use_audio_in_video), lambda: None)


def picture(height: int = 24, width: int = 40, seed: int = 0) -> np.ndarray[Any, Any]:
    """uint8 [height, width, 3], smooth enough for a codec."""
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(rows / (3 + c) + seed) + np.cos(columns / (4 + c) - seed) for c in range(3)]
    return (127 + 60 * np.stack(waves, axis=-1)).astype(np.uint8)


def tone(seconds: float = 0.5, rate: int = RATE, channels: int = 1) -> np.ndarray[Any, Any]:
    """float32 [channels, n]."""
    times = np.arange(int(rate * seconds)) / rate
    return np.stack([0.3 * np.sin(2 * np.pi * 330 * (k + 1) * times) for k in range(channels)]).astype(np.float32)


def image_bytes(pixels: np.ndarray[Any, Any], form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


def sound_bytes(samples: np.ndarray[Any, Any], rate: int = RATE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples.T, rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


def video_bytes(
    frames: list[np.ndarray[Any, Any]],
    fps: int = 4,
    sound: np.ndarray[Any, Any] | None = None,
    sound_rate: int = RATE,
    form: str = "mp4",
    options: dict[str, str] | None = None,
) -> bytes:
    """The frames as H.264 (or VP8 in webm), near lossless; sound: float32 [channels, n]."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"video.{form}"
        _write_video(path, frames, fps, sound, sound_rate, options or {})
        return path.read_bytes()


def _write_video(
    path: Path,
    frames: list[np.ndarray[Any, Any]],
    fps: int,
    sound: np.ndarray[Any, Any] | None,
    sound_rate: int,
    options: dict[str, str],
) -> None:
    is_webm = path.suffix == ".webm"
    codecs = ("libvpx", "libopus") if is_webm else ("libx264", "aac")
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codecs[0], rate=fps, options={} if is_webm else {"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        layout = {None: "", 1: "mono", 2: "stereo"}[None if sound is None else len(sound)]
        track = container.add_stream(codecs[1], rate=sound_rate, layout=layout) if sound is not None else None
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if track is not None and sound is not None:
            block = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound), format="fltp", layout=layout)
            block.sample_rate, block.pts = sound_rate, 0
            container.mux(track.encode(block))
            container.mux(track.encode())


def sound_file_bytes_in_mp4(samples: np.ndarray[Any, Any]) -> bytes:
    """An MP4 that holds sound alone."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        track = container.add_stream("aac", rate=RATE, layout="mono")
        block = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        block.sample_rate, block.pts = RATE, 0
        container.mux(track.encode(block))
        container.mux(track.encode())
    return file.getvalue()


class FramesOneByOne:
    """A video processor over the library's image processor, frame by frame: its own one needs torchvision."""

    model_input_names = ("pixel_values_videos", "video_grid_thw")
    valid_kwargs = Qwen2VLImageProcessorPil.valid_kwargs

    def __init__(self, images: Any) -> None:
        self._images = images
        self.merge_size, self.temporal_patch_size = images.merge_size, images.temporal_patch_size

    def __call__(self, videos: list[Any], size: dict[str, int], **_: Any) -> dict[str, Any]:
        values, grids = [], []
        for video in videos:
            made = [self._images(list(frame[None]), size=size, return_tensors="pt") for frame in video]
            made += made[-1:] * (-len(made) % self.temporal_patch_size)
            slots = [
                one["pixel_values"].view(-1, 3, self.temporal_patch_size, self._images.patch_size**2) for one in made
            ]
            for first in range(0, len(slots), self.temporal_patch_size):
                group = slots[first : first + self.temporal_patch_size]
                values.append(torch.stack([slot[:, :, i] for i, slot in enumerate(group)], 2).flatten(1))
            grids.append([len(made) // self.temporal_patch_size, *made[0]["image_grid_thw"][0, 1:].tolist()])
        return {"pixel_values_videos": torch.cat(values), "video_grid_thw": torch.tensor(grids)}


class AnyParts:
    """Of a processor of the library: without its check that every part is of the library's own class."""

    def check_argument_for_proper_class(self, argument_name: str, argument: object) -> type:
        return type(argument)


class OmniProcessorWithoutTorchvision(AnyParts, Qwen2_5OmniProcessor):
    """The library's class and call."""


def reference_processor(folder: Path) -> Any:
    """transformers' processor of the folder; without torchvision put together from the parts that run without it."""
    if is_torchvision_available():
        return AutoProcessor.from_pretrained(folder)
    images = Qwen2VLImageProcessorPil.from_pretrained(folder)
    return OmniProcessorWithoutTorchvision(
        image_processor=images,
        video_processor=FramesOneByOne(images),
        feature_extractor=WhisperFeatureExtractor.from_pretrained(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder),
    )
