"""Prompts that are too long, cut to fit. Of a chat only messages and their texts go: the template writes what is left,
with its own marks, the system message and the beginning of the answer.

left: the oldest turns go; where the last one, which always stays, is too long alone, its longest texts lose their
beginning.
middle: the turns behind the first go, oldest first; where the first and the last are too long, their longest texts lose
their middle.
right: the newest messages go; the text of the one at the edge loses its end.
A turn is a message of the user and what follows it, up to the next one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

from vllm_omni.worker.ar.chat import Chat

Side = Literal["left", "right", "middle"]
Message = Mapping[str, Any]
Encode = Callable[[Chat], list[int]]
MAX_TRIES = 16  # for the length of one text; the best of them is taken


def cut_tokens(token_ids: Sequence[int], side: Side, num_kept: int) -> list[int]:
    """num_kept of them: without their beginning, their end, or their middle."""
    if side == "left":
        return list(token_ids[len(token_ids) - num_kept :])
    head = num_kept if side == "right" else (num_kept + 1) // 2
    return [*token_ids[:head], *token_ids[len(token_ids) - (num_kept - head) :]]


def cut_text(text: str, side: Side, num_kept: int) -> str:
    """num_kept of its characters, as `cut_tokens`."""
    if side == "left":
        return text[len(text) - num_kept :]
    head = num_kept if side == "right" else (num_kept + 1) // 2
    return text[:head] + text[len(text) - (num_kept - head) :]


class ChatCutter:
    """Cuts one chat, whose contents are texts, to at most `limit` tokens."""

    def __init__(self, chat: Chat, limit: int, encode: Encode) -> None:
        """encode: a chat's tokens; what it raises over a shorter chat goes to the caller."""
        self._chat = chat
        self._limit = limit
        self._encode = encode
        self._head = _leading(chat.messages)
        self._rest = list(chat.messages[len(self._head) :])

    def cut(self, side: Side) -> list[int] | None:
        """The tokens of the longest chat that is left so and fits, or None where none does."""
        if not self._rest:
            return None
        if side == "right":
            return self._cut_right()
        turns = _turns(self._rest)
        num_first = 1 if side == "middle" and len(turns) > 1 else 0
        low, high = 1, len(turns) - 1 - num_first
        num_most, tokens = high, None
        while low <= high:  # the fewest turns that make it fit
            num_dropped = (low + high) // 2
            found = self._fitting(_joined(turns[:num_first] + turns[num_first + num_dropped :]))
            if found is None:
                low = num_dropped + 1
            else:
                tokens, high = found, num_dropped - 1
        if tokens is not None:
            return tokens
        messages = _joined(turns[:num_first] + turns[num_first + num_most :])
        return self._cut_texts(messages, range(len(messages)), side)

    def _cut_right(self) -> list[int] | None:
        low, high = 0, len(self._rest) - 1
        tokens: list[int] | None = None
        while low < high:  # the most messages that fit whole
            num_kept = (low + high + 1) // 2
            found = self._fitting(self._rest[:num_kept])
            if found is None:
                high = num_kept - 1
            else:
                tokens, low = found, num_kept
        return self._cut_texts(self._rest[: low + 1], [low], "right") or tokens

    def _cut_texts(self, messages: list[Message], indices: Collection[int], side: Side) -> list[int] | None:
        """All texts of these messages cut to one length, the largest with which they fit; shorter ones stay whole. None
        where even one character of each is too much.
        """
        longest = max(len(_text(messages[index])) for index in indices)

        def tokens_with(num_chars: int) -> list[int]:
            cut = [
                _shortened(message, side, num_chars) if n in indices else message for n, message in enumerate(messages)
            ]
            return self._tokens(cut)

        fits, too_long = 1, longest  # a template may refuse a message without any text
        if not longest or len(best := tokens_with(fits)) > self._limit:
            return None
        num_least, num_most = len(best), len(tokens_with(too_long))
        for _ in range(MAX_TRIES):
            if too_long - fits <= 1 or num_least == self._limit:
                break
            share = (self._limit - num_least) / max(num_most - num_least, 1)
            num_chars = min(max(fits + int(share * (too_long - fits)), fits + 1), too_long - 1)
            tokens = tokens_with(num_chars)
            if len(tokens) <= self._limit:
                fits, num_least, best = num_chars, len(tokens), tokens
            else:
                too_long, num_most = num_chars, len(tokens)
        return best

    def _fitting(self, messages: list[Message]) -> list[int] | None:
        tokens = self._tokens(messages)
        return tokens if len(tokens) <= self._limit else None

    def _tokens(self, messages: list[Message]) -> list[int]:
        last = messages[-1]
        continues = self._chat.continues and last["role"] == "assistant" and bool(_text(last))
        chat = dataclasses.replace(self._chat, messages=[*self._head, *messages], continues=continues)
        return self._encode(chat)


def _leading(messages: Sequence[Message]) -> list[Message]:
    """The system messages at the beginning."""
    found: list[Message] = []
    for message in messages:
        if message["role"] not in ("system", "developer"):
            break
        found.append(message)
    return found


def _turns(messages: Sequence[Message]) -> list[list[Message]]:
    turns: list[list[Message]] = []
    for message in messages:
        if message["role"] == "user" or not turns:
            turns.append([])
        turns[-1].append(message)
    return turns


def _joined(turns: Sequence[Sequence[Message]]) -> list[Message]:
    return [message for turn in turns for message in turn]


def _shortened(message: Message, side: Side, num_chars: int) -> Message:
    text = _text(message)
    return message if len(text) <= num_chars else {**message, "content": cut_text(text, side, num_chars)}


def _text(message: Message) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""
