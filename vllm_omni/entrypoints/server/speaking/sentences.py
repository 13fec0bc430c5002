"""Text that comes in pieces, cut into what can be said by itself."""

from __future__ import annotations

import re
from typing import Literal

Granularity = Literal["none", "sentence", "clause"]

# Latin marks end where a space follows, so that 3.14 stays whole; those of Chinese and Japanese end by themselves.
_SENTENCE = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s)|[。！？]+[”’」』）]*|\n+")
_CLAUSE = re.compile(r"[.!?…,;:]+[\"'”’)\]]*(?=\s)|[。！？，、；：]+[”’」』）]*|\n+")
_ENDS = {"sentence": _SENTENCE, "clause": _CLAUSE}


class Sentences:
    """What `add` and `flush` return, put together, is the text, but for white space around the cuts."""

    def __init__(self, granularity: Granularity) -> None:
        self._ends = _ENDS.get(granularity)
        self._rest = ""

    @property
    def num_chars(self) -> int:
        """That wait for their sentence's end."""
        return len(self._rest)

    def add(self, text: str) -> list[str]:
        """The sentences (or clauses) that are whole by now."""
        self._rest += text
        if self._ends is None:
            return []
        start, found = 0, []
        for match in self._ends.finditer(self._rest):
            if match.end() == len(self._rest):  # more marks may follow
                break
            found.append(self._rest[start : match.end()].strip())
            start = match.end()
        self._rest = self._rest[start:]
        return [sentence for sentence in found if has_words(sentence)]

    def flush(self) -> list[str]:
        """What is left at the end."""
        rest, self._rest = self._rest.strip(), ""
        return [rest] if has_words(rest) else []

    def take_begun(self) -> list[str]:
        """What waits, where that has words, and more of the same is to follow it."""
        if not has_words(self._rest):
            return []
        rest, self._rest = self._rest.lstrip(), ""
        return [rest]


def has_words(text: str) -> bool:
    """Whether there is something to say: not marks alone."""
    return any(char.isalnum() for char in text)
