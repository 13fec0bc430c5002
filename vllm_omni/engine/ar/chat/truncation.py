"""Prompts that are too long, cut to fit. Of a chat only messages and their texts go: the template writes what is left,
with its own marks, the system message and the beginning of the answer.

left: the oldest turns go, and of the last turn, which always stays, the longest text loses its beginning.
middle: the turns behind the first go, oldest first; of the first and the last the longest text loses its middle.
right: the newest messages go; of the one at the edge the text loses its end.
A turn is a message of the user and what follows it, up to the next one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
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
        return tokens or self._cut_longest(_joined(turns[:num_first] + turns[num_first + num_most :]), side)

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
        return self._cut_text_of(self._rest[: low + 1], low, "right") or tokens

    def _cut_longest(self, messages: list[Message], side: Side) -> list[int] | None:
        return self._cut_text_of(messages, max(range(len(messages)), key=lambda n: len(_text(messages[n]))), side)

    def _cut_text_of(self, messages: list[Message], index: int, side: Side) -> list[int] | None:
        """As much of one text as fits; None where nothing of it does."""
        text = _text(messages[index])

        def tokens_with(num_kept: int) -> list[int]:
            shorter = {**messages[index], "content": cut_text(text, side, num_kept)}
            return self._tokens([*messages[:index], shorter, *messages[index + 1 :]])

        fits, too_long = 0, len(text)
        num_least, num_most = len(tokens_with(0)), len(tokens_with(len(text)))
        best: list[int] | None = None
        for _ in range(MAX_TRIES):
            if num_least > self._limit or too_long - fits <= 1 or num_least == self._limit:
                break
            share = (self._limit - num_least) / max(num_most - num_least, 1)
            num_kept = min(max(fits + int(share * (too_long - fits)), fits + 1), too_long - 1)
            tokens = tokens_with(num_kept)
            if len(tokens) <= self._limit:
                fits, num_least, best = num_kept, len(tokens), tokens
            else:
                too_long, num_most = num_kept, len(tokens)
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


def _text(message: Message) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""
