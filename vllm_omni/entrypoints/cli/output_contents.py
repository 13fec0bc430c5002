"""What the files of an answer hold, as bytes. Knows no folder and no file name but its suffix."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm_omni.entrypoints.cli.as_json import output_as_json
from vllm_omni.errors import InvalidRequestError
from vllm_omni.request import OmniOutput

if TYPE_CHECKING:
    from vllm_omni.media.metadata import MediaMetadata

# here as names, so that the command line shows its help without the libraries that write them
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".tif", ".tiff")
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aac", ".pcm")
VIDEO_SUFFIXES = (".mp4", ".webm", ".gif", ".webp")
TEXT_SUFFIXES = (".txt", ".json", ".jsonl")
HOLDS_ALL = {"image": ".png", "audio": ".wav", "video": ".webp"}  # whatever size, rate or number of channels


@dataclass(frozen=True, slots=True)
class Provenance:
    """What files say of how they were made, besides what the outputs know."""

    models: Mapping[str, str | None] = field(default_factory=dict)  # by stage, as the config names them
    inputs: Mapping[str, Any] = field(default_factory=dict)  # what the requests asked besides
    says_prompt: bool = True

    def metadata(self, output: OmniOutput, prompt: str | None, stage: str, index: int, sample: Any) -> MediaMetadata:
        """Of sample `index` of a stage, a picture, a sound or a video."""
        from vllm_omni.media.metadata import MediaMetadata

        return MediaMetadata.of(
            output,
            stage,
            index,
            model=self.models.get(stage),
            sample=sample,
            prompt=prompt if self.says_prompt else None,
            inputs={k: v for k, v in self.inputs.items() if self.says_prompt or isinstance(v, int | float)},
        )


def check_can_be_written(kind: str, suffix: str) -> None:
    """InvalidRequestError for a format of pictures or videos that the installed libraries do not write."""
    if kind == "video":
        from vllm_omni.media.video_encoding import VIDEO_SUFFIXES as VIDEOS
        from vllm_omni.media.video_encoding import check_video_format

        check_video_format(VIDEOS[suffix])
    if kind == "image":
        from vllm_omni.media.image_encoding import IMAGE_SUFFIXES as FORMATS
        from vllm_omni.media.image_encoding import check_image_format

        check_image_format(FORMATS[suffix])


def media_content(kind: str, item: Any, suffix: str, metadata: MediaMetadata) -> tuple[bytes, str, str]:
    """The bytes of a picture ("image"), a sound ("audio") or a video, and their suffix; a complaint where it is another
    one than was asked for: that format does not hold them.
    """
    from vllm_omni.media.audio_encoding import AUDIO_SUFFIXES as AUDIOS
    from vllm_omni.media.audio_encoding import encode_audio
    from vllm_omni.media.image_encoding import IMAGE_SUFFIXES as IMAGES
    from vllm_omni.media.image_encoding import encode_image
    from vllm_omni.media.video_encoding import VIDEO_SUFFIXES as VIDEOS
    from vllm_omni.media.video_encoding import encode_video

    writers: Mapping[str, tuple[Callable[..., bytes], Mapping[str, str]]] = {
        "image": (encode_image, IMAGES),
        "audio": (encode_audio, AUDIOS),
        "video": (encode_video, VIDEOS),
    }
    encode, formats = writers[kind]
    try:
        return encode(item, formats[suffix], metadata=metadata), suffix, ""
    except InvalidRequestError as error:
        suffix = HOLDS_ALL[kind]
        return encode(item, formats[suffix], metadata=metadata), suffix, str(error)


def text_content(outputs: Sequence[OmniOutput], prompts: Sequence[str], suffix: str) -> bytes:
    """All text: as it is, as a list of JSON objects, or as one of them in each line."""
    if suffix == ".txt":
        lines = [completion.text for output in outputs for completion in output.completions]
    else:
        answers = [output_as_json(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]
        lines = [json.dumps(answer, ensure_ascii=False) for answer in answers]
        lines = lines if suffix == ".jsonl" else [json.dumps(answers, ensure_ascii=False, indent=2)]
    return "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace")


def tensors_content(output: OmniOutput) -> bytes:
    from safetensors.torch import save

    return bytes(save({name: tensor.contiguous() for name, tensor in output.tensors.items()}))
