"""Chat messages whose content is a list of parts: what is in them, checked. Opens nothing and knows no model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from vllm_omni.errors import InvalidRequestError
from vllm_omni.request import Messages, Prompt
from vllm_omni.utils.checks import check_number, did_you_mean
from vllm_omni.utils.plain import num_json_chars

TEXT = "text"
PART_TYPES = (TEXT, "image", "video", "audio")
MAX_FPS = 240.0
# what may stand beside the source
OWN_KEYS = {"image": ("max_pixels",), "video": ("fps",), "audio": ("sampling_rate",)}


@dataclass(frozen=True, slots=True)
class MediaPart:
    """One image, audio or video in a message."""

    kind: str  # "image", "audio" or "video"
    source: Any  # what the caller gave
    name: str  # what error messages call it
    fps: float | None = None  # frames per second that the model is to see; None: as many as it usually does
    max_pixels: int | None = None  # of the image as the model sees it; None: as many as it usually does


def is_messages(prompt: Prompt) -> TypeGuard[Messages]:
    return not isinstance(prompt, str) and isinstance(prompt[0], Mapping)


def has_media(messages: Messages) -> bool:
    """Whether some part is no text; InvalidRequestError for a part that is none."""
    return any(part["type"] != TEXT for _, part in _parts(messages))


def media_parts(messages: Messages) -> list[MediaPart]:
    """All parts but texts, in order; InvalidRequestError for a part that is none."""
    return [
        MediaPart(part["type"], _source(part), f"{where}.{part['type']}", _fps(part, where), _max_pixels(part, where))
        for where, part in _parts(messages)
        if part["type"] != TEXT
    ]


def without_sources(messages: Messages) -> list[dict[str, Any]]:
    """The messages as a chat template reads them: of media the type alone."""
    return [
        {**message, "content": list(map(_bare, message["content"]))} if _has_parts(message) else dict(message)
        for message in messages
    ]


def as_texts(messages: Messages) -> list[dict[str, Any]]:
    """The messages with plain strings as content, for a template that knows no parts; InvalidRequestError for media."""
    for where, part in _parts(messages):
        if part["type"] != TEXT:
            raise InvalidRequestError(
                f"{where}: got a part of type {part['type']!r}, expected only 'text': this stage's model reads no media"
            )
    return [
        {**message, "content": "".join(part[TEXT] for part in message["content"])}
        if _has_parts(message)
        else dict(message)
        for message in messages
    ]


def num_chars(prompt: Prompt) -> int:
    """Characters of a text, or of all that a template may read of messages; token ids have none (the model's length
    bounds them).
    """
    if isinstance(prompt, str):
        return len(prompt)
    if not is_messages(prompt):
        return 0
    texts = sum(len(part[TEXT]) for _, part in _parts(prompt) if part["type"] == TEXT)
    return texts + sum(map(_num_plain_chars, prompt))


def _num_plain_chars(message: Mapping[str, Any]) -> int:
    """Of a content that is text, and of all keys beyond the usual two."""
    content = message.get("content")
    more = {key: value for key, value in message.items() if key not in ("role", "content")}
    return (len(content) if isinstance(content, str) else 0) + num_json_chars(more)


def _has_parts(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return isinstance(content, Sequence) and not isinstance(content, str)


def _parts(messages: Messages) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where, part) of every part, checked."""
    for number, message in enumerate(messages):
        if _has_parts(message):
            for index, part in enumerate(message["content"]):
                where = f"messages[{number}].content[{index}]"
                _check_part(part, where)
                yield where, part


def _check_part(part: object, where: str) -> None:
    if not isinstance(part, Mapping) or "type" not in part:
        shown = f"the keys {sorted(map(str, part))}" if isinstance(part, Mapping) else type(part).__name__
        raise InvalidRequestError(f"{where}: got {shown}, expected a mapping with 'type', as {{'type': 'text', ...}}")
    kind = part["type"]
    if not isinstance(kind, str) or kind not in PART_TYPES:
        raise InvalidRequestError(f"{where}: got the type {kind!r:.80}{did_you_mean(str(kind)[:80], PART_TYPES)}")
    if part.get(kind) is None:
        raise InvalidRequestError(f"{where}: got the type {kind!r} without {kind!r}, expected what it holds there")
    known = {"type", kind, *OWN_KEYS.get(kind, ())}
    for key in part:
        if key not in known:
            raise InvalidRequestError(f"{where}: unknown key {key!r:.80}{did_you_mean(str(key)[:80], known)}")
    if kind == TEXT and not isinstance(part[TEXT], str):
        raise InvalidRequestError(f"{where}.text: got {type(part[TEXT]).__name__}, expected a string")


def _source(part: Mapping[str, Any]) -> Any:
    """What is in a part; a bare array with the rate beside it as the pair of both."""
    if part.get("sampling_rate") is None:
        return part[part["type"]]
    return part[part["type"]], part["sampling_rate"]


def _fps(part: Mapping[str, Any], where: str) -> float | None:
    fps = part.get("fps")
    if fps is None:
        return None
    check_number(
        f"{where}.fps", fps, 0, MAX_FPS, above_low=True, raises=InvalidRequestError, hint=" (frames per second)"
    )
    return float(fps)


def _max_pixels(part: Mapping[str, Any], where: str) -> int | None:
    most = part.get("max_pixels")
    if most is None:
        return None
    check_number(f"{where}.max_pixels", most, 1, raises=InvalidRequestError, integer=True)
    return int(most)


def _bare(part: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": TEXT, TEXT: part[TEXT]} if part["type"] == TEXT else {"type": part["type"]}
