"""The body of `/v1/videos`: OpenAI's fields, and those of diffusion."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from vllm_omni.entrypoints.server.schemas.base import MAX_TEXT, DiffusionFields
from vllm_omni.params import MAX_FPS, MIN_FPS

MAX_REFERENCE = 1_000_000_000  # characters; how large a body may be is the gate's to say
IMAGE_URL = "input_reference[image_url]"  # as a form says it


class VideoBody(DiffusionFields):
    """As OpenAI's; what stands below `input_reference` is vllm-omni's."""

    prompt: Annotated[str, Field(max_length=MAX_TEXT)]
    seconds: float | None = Field(None, gt=0, le=100_000, description="instead of num_frames")
    input_reference: Annotated[str, Field(max_length=MAX_REFERENCE)] | None = Field(
        None, description="a picture: a data URI, base64 or a URL, or an object with its image_url; or a file of a form"
    )
    num_frames: int | None = Field(None, ge=1)
    fps: float | None = Field(None, ge=MIN_FPS, le=MAX_FPS, description="frames per second")
    output_format: Literal["mp4", "webm", "gif", "webp"] = "mp4"

    @model_validator(mode="before")
    @classmethod
    def _with_plain_reference(cls, data: Any) -> Any:
        """{"image_url": "..."}, and what forms make of it, as the string alone."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        if IMAGE_URL in data:
            data["input_reference"] = data.pop(IMAGE_URL)
        reference = data.get("input_reference")
        if isinstance(reference, dict) and set(reference) == {"image_url"}:
            data["input_reference"] = reference["image_url"]
        return data
