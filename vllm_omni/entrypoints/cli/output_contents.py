"""What the files of an answer hold, as bytes. Knows no folder and no file name but its suffix."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm_omni.entrypoints.cli.as_json import output_as_json
from vllm_omni.errors import InvalidRequestError
from vllm_omni.request import OmniOutput

if TYPE_CHECKING:
    from PIL.Image import Image

    from vllm_omni.media.metadata import MediaMetadata

# here as names, so that the command line shows its help without the libraries that write them
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".tif", ".tiff")
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aac", ".pcm")
TEXT_SUFFIXES = (".txt", ".json", ".jsonl")


@dataclass(frozen=True, slots=True)
class Provenance:
    """What files say of how they were made, besides what the outputs know."""

    models: Mapping[str, str | None] = field(default_factory=dict)  # by stage, as the config names them
    inputs: Mapping[str, Any] = field(default_factory=dict)  # what the requests asked besides
    says_prompt: bool = True

    def metadata(
        self, output: OmniOutput, prompt: str | None, stage: str, index: int, image: Image | None
    ) -> MediaMetadata:
        """Of sample `index` of a stage. image: that sample, where it is one."""
        from vllm_omni.media.metadata import MediaMetadata

        return MediaMetadata.of(
            output,
            stage,
            index,
            model=self.models.get(stage),
            image=image,
            prompt=prompt if self.says_prompt else None,
            inputs={k: v for k, v in self.inputs.items() if self.says_prompt or isinstance(v, int | float)},
        )


def check_suffix_can_be_written(suffix: str) -> None:
    """InvalidRequestError for a picture format that the installed Pillow does not write."""
    if suffix in IMAGE_SUFFIXES:
        from vllm_omni.media.image_encoding import IMAGE_SUFFIXES as FORMATS
        from vllm_omni.media.image_encoding import check_image_format

        check_image_format(FORMATS[suffix])


def media_content(item: Any, suffix: str, metadata: MediaMetadata) -> tuple[bytes, str, str]:
    """The bytes of a picture or a sound, and their suffix; a complaint where it is another one than was asked for:
    that format does not hold them.
    """
    from vllm_omni.media.audio_encoding import AUDIO_SUFFIXES as AUDIO_FORMATS
    from vllm_omni.media.audio_encoding import encode_audio
    from vllm_omni.media.image_encoding import IMAGE_SUFFIXES as IMAGE_FORMATS
    from vllm_omni.media.image_encoding import encode_image

    is_image = suffix in IMAGE_FORMATS
    try:
        if is_image:
            return encode_image(item, IMAGE_FORMATS[suffix], metadata=metadata), suffix, ""
        return encode_audio(item, AUDIO_FORMATS[suffix], metadata=metadata), suffix, ""
    except InvalidRequestError as error:
        if is_image:
            return encode_image(item, "png", metadata=metadata), ".png", str(error)
        return encode_audio(item, "wav", metadata=metadata), ".wav", str(error)


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
