"""What was said in one session: items in order, within a limit of number and bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from vllm_omni.entrypoints.server.http.api_error import ApiError
from vllm_omni.request import new_request_id

MAX_ITEMS = 1_000
ROOT = "root"  # before the first item


@dataclass(slots=True)
class Content:
    """One part of an item. What is heard of an answer is not kept, only its words."""

    type: str
    text: str = ""  # of sound: what is said in it, where that is known
    source: Any = None  # a sound or a picture as a stage reads it
    data: str | None = None  # the same as the client sent it
    duration_ms: int = 0  # of an answer's sound

    @property
    def num_bytes(self) -> int:
        return len(self.text) + 2 * len(self.data or "")

    def describe(self, with_data: bool = False) -> dict[str, Any]:
        is_sound = self.type.endswith("audio")
        about: dict[str, Any] = {"type": self.type}
        if self.type.endswith("image"):
            about |= {"image_url": self.data} if with_data else {}
        else:
            about["transcript" if is_sound else "text"] = self.text or (None if self.source is not None else "")
        return about | ({"audio": self.data} if with_data and is_sound and self.data is not None else {})


@dataclass(slots=True)
class Message:
    role: Literal["system", "user", "assistant"]
    content: list[Content] = field(default_factory=list)
    id: str = field(default_factory=lambda: f"item_{new_request_id()}")
    status: Literal["completed", "incomplete", "in_progress"] = "completed"

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.content)

    def describe(self, with_data: bool = False) -> dict[str, Any]:
        """As the client knows it; with_data: with the sounds and pictures that it sent."""
        content = [part.describe(with_data) for part in self.content]
        about = {"id": self.id, "object": "realtime.item", "type": "message", "status": self.status}
        return {**about, "role": self.role, "content": content}

    def as_prompt(self) -> dict[str, Any]:
        """As a stage reads it."""
        if all(part.source is None for part in self.content):
            return {"role": self.role, "content": "\n".join(part.text for part in self.content)}
        return {"role": self.role, "content": [_prompt_part(part) for part in self.content]}


class Conversation:
    """ApiError 400 for what does not fit, or names no item."""

    def __init__(self, max_bytes: int) -> None:
        self.id = f"conv_{new_request_id()}"
        self._max_bytes = max_bytes
        self._items: list[Message] = []

    def __iter__(self) -> Iterator[Message]:
        return iter(self._items)

    def add(self, item: Message, after: str | None = None) -> str | None:
        """after: an item's id, or `root`; None: at the end. Returns the id of the item before it."""
        if any(item.id == other.id for other in self._items):
            raise ApiError(400, f"item.id: got {item.id!r:.80}, which is there", code="duplicate_id", param="item.id")
        if len(self._items) >= MAX_ITEMS:
            raise ApiError(400, f"item: the conversation has {MAX_ITEMS} already; delete some", code="too_many_items")
        if sum(other.num_bytes for other in self._items) + item.num_bytes > self._max_bytes:
            limit = self._max_bytes / 2**20
            raise ApiError(400, f"item: the conversation is larger than {limit:g} MB; delete some", code="too_large")
        position = len(self._items) if after is None else 0 if after == ROOT else self._position(after) + 1
        self._items.insert(position, item)
        return self._items[position - 1].id if position else None

    def find(self, item_id: str) -> Message:
        return self._items[self._position(item_id)]

    def delete(self, item_id: str) -> None:
        del self._items[self._position(item_id)]

    def truncate(self, item_id: str, content_index: int, audio_end_ms: int) -> None:
        """Cuts the words of an answer to about those that were heard until then."""
        item = self.find(item_id)
        content = item.content[content_index] if content_index < len(item.content) else None
        if item.role != "assistant" or content is None or content.type != "output_audio":
            raise ApiError(
                400,
                f"content_index: item {item_id!r:.80} has no spoken answer there",
                code="invalid_value",
                param="content_index",
            )
        if audio_end_ms > content.duration_ms:
            raise ApiError(
                400,
                f"audio_end_ms: got {audio_end_ms}, expected at most {content.duration_ms}, the length of the sound",
                code="invalid_value",
                param="audio_end_ms",
            )
        words = content.text.split()
        num_heard = len(words) * audio_end_ms // max(1, content.duration_ms)
        content.text, content.duration_ms = " ".join(words[:num_heard]), audio_end_ms

    def _position(self, item_id: str) -> int:
        for position, item in enumerate(self._items):
            if item.id == item_id:
                return position
        raise ApiError(400, f"item_id: there is no item {item_id!r:.80}", code="item_not_found", param="item_id")


def prompt_of(items: Sequence[Message], instructions: str | None) -> list[dict[str, Any]]:
    """The messages of a prompt."""
    first = [] if not instructions else [{"role": "system", "content": instructions}]
    return [*first, *(item.as_prompt() for item in items if item.content)]


def _prompt_part(part: Content) -> dict[str, Any]:
    if part.source is None:
        return {"type": "text", "text": part.text}
    kind = "image" if part.type.endswith("image") else "audio"
    return {"type": kind, kind: part.source}
