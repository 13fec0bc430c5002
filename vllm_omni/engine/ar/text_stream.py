"""The text of one sample as it is written, token by token. Knows no model and no sampling."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_omni.engine.ar.tokenizer import TextProcessor

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer gives for bytes that are no character yet


class TextStream:
    """The text of one sample as it is written, cut before the first stop string.

    Nothing is given out that could still change: neither half a character nor what may be the beginning of a stop
    string.
    """

    def __init__(self, processor: TextProcessor, stop: Sequence[str], skip_special_tokens: bool) -> None:
        self._processor = processor
        self._stop = tuple(stop)
        self._skip_special_tokens = skip_special_tokens
        self._token_ids: list[int] = []
        self._context_start = 0  # tokens from here on are decoded together, as a tokenizer may join neighbours
        self._read = 0  # tokens before here are in `text`
        self._num_given = 0
        self.text = ""
        self.is_stopped = False

    def push(self, token_id: int, can_stop: bool = True) -> str:
        """Takes the next token; returns the text that is new and certain. `can_stop`: whether a stop string may end the
        text here.
        """
        self._token_ids.append(token_id)
        new = self._decode_new()
        if new and not new.endswith(UNFINISHED):
            self._take(new, can_stop)
        return self._give(len(self.text) - self._held_back())

    def finish(self) -> str:
        """Ends the text; returns what was held back."""
        if not self.is_stopped:
            self._take(self._decode_new(), can_stop=False)
        return self._give(len(self.text))

    def _decode_new(self) -> str:
        old = self._decode(self._token_ids[self._context_start : self._read])
        return self._decode(self._token_ids[self._context_start :])[len(old) :]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._processor.decode(token_ids, self._skip_special_tokens) if token_ids else ""

    def _take(self, new: str, can_stop: bool) -> None:
        before = len(self.text)
        self.text += new
        self._context_start, self._read = self._read, len(self._token_ids)
        found = [self.text.find(stop, max(0, before - len(stop) + 1)) for stop in self._stop] if can_stop else []
        places = [place for place in found if place >= 0]
        if places:
            self.text = self.text[: min(places)]
            self.is_stopped = True

    def _held_back(self) -> int:
        if self.is_stopped:
            return 0
        lengths = range(min(len(self.text), max(map(len, self._stop), default=1) - 1), 0, -1)
        return next((n for n in lengths if any(stop.startswith(self.text[-n:]) for stop in self._stop)), 0)

    def _give(self, end: int) -> str:
        given = self.text[self._num_given : end]
        self._num_given = max(self._num_given, end)
        return given
