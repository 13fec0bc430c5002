"""The body of `/v1/audio/voices`: a form with a sound, as OpenAI's clients and vllm-omni's send it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from vllm_omni.entrypoints.server.schemas.base import Body
from vllm_omni.voices import MAX_CONSENT, MAX_TEXT, NAME_RULE

NO_CONSENT = ("", "false", "no", "0")


class VoiceBody(Body):
    """`audio_sample` is a file of the form; `ref_text` is vllm-omni's word for `text`."""

    name: Annotated[str, Field(max_length=512, description=NAME_RULE)]
    consent: Annotated[str, Field(max_length=MAX_CONSENT)] | None = Field(
        None, description="who agreed that this voice is cloned, and how, or the id of a record of it; required"
    )
    type: Literal["audio_sample"] = "audio_sample"
    text: Annotated[str, Field(max_length=MAX_TEXT)] | None = Field(
        None, description="what is said in the sound; without it the speaker is imitated, not the way of speaking"
    )

    @model_validator(mode="before")
    @classmethod
    def _in_our_words(cls, data: Any) -> Any:
        """`text` for `ref_text`, where that stands alone; a consent that is none is left out."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        if str(data.get("consent", "")).strip().lower() in NO_CONSENT:
            data.pop("consent", None)
        if "ref_text" in data and "text" not in data:
            data["text"] = data.pop("ref_text")
        return data
