"""The bodies of `/v1/images`: OpenAI's fields, and those of diffusion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from vllm_omni.entrypoints.server.schemas.base import MAX_TEXT, DiffusionFields

ImageFormat = Literal["png", "jpeg", "webp"]
MAX_PARTIAL_IMAGES = 3


class ImageBody(DiffusionFields):
    """As OpenAI's; what stands below `stream` is vllm-omni's."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "background": ("auto", "opaque"),
        "quality": ("auto", "standard"),
        "moderation": ("auto", "low"),
        "response_format": ("b64_json",),
        "complexity": ("auto",),
        "input_fidelity": ("low",),
        "frame_count": (1,),
    }

    prompt: Annotated[str, Field(max_length=MAX_TEXT)]
    n: int | None = Field(None, ge=1, le=10)
    output_format: ImageFormat = "png"
    output_compression: int | None = Field(None, ge=0, le=100, description="quality of jpeg and webp, in percent")
    partial_images: int | None = Field(None, ge=0, le=MAX_PARTIAL_IMAGES)
    stream: bool = False


class VariationBody(ImageBody):
    prompt: Annotated[str, Field(max_length=MAX_TEXT)] = ""
