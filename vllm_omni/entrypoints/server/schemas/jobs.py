"""The body of `/v1/jobs`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from vllm_omni.entrypoints.server.schemas.base import MAX_TEXT, DiffusionFields

IMAGE_FORMATS = ("png", "jpeg", "webp")
AUDIO_FORMATS = ("wav", "flac", "mp3", "opus", "aac")


class JobBody(DiffusionFields):
    """One prompt for a picture or a sound that takes long. `extra_params` holds what the model reads besides."""

    prompt: Annotated[str, Field(max_length=MAX_TEXT)]
    kind: Literal["image", "audio"] | None = Field(None, description="needed where the model makes both")
    n: int | None = Field(None, ge=1, le=16)
    output_format: Literal["png", "jpeg", "webp", "wav", "flac", "mp3", "opus", "aac"] | None = None

    @property
    def has_files_of(self) -> dict[str, tuple[str, ...]]:
        return {"image": IMAGE_FORMATS, "audio": AUDIO_FORMATS}

    def file_format(self, kind: str) -> Any:
        """The format asked for, else the kind's own; None for one that does not fit."""
        known = self.has_files_of[kind]
        wanted = self.output_format or known[0]
        return wanted if wanted in known else None
