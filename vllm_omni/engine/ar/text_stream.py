"""The text of one sample as it is written, cut before the first stop string. Knows no model and no sampling."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_omni.engine.ar.stop_strings import StopStrings, Symbol
from vllm_omni.engine.ar.tokenizer import TextProcessor

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer gives for bytes that are no character yet


class StopRules:
    """The stop strings of one request, and what they mean in its texts.

    Special tokens that are no part of the text have no characters, but a stop string that holds one means this token,
    and is looked for in the text with all of them: one that stands between parts what stands around it. The text itself
    is searched besides, as the reader sees it.
    """

    def __init__(self, processor: TextProcessor, stop: Sequence[str], skip_special_tokens: bool) -> None:
        self.has_any = bool(stop)
        self.in_text = StopStrings(stop)
        hidden = processor.special_tokens if skip_special_tokens else {}
        with_tokens = [_symbols(string, hidden) for string in stop]
        with_tokens = [symbols for symbols in with_tokens if any(isinstance(symbol, int) for symbol in symbols)]
        self.tokens = frozenset(hidden.values() if with_tokens else ())  # that the text with all of them is made of
        self.with_tokens = StopStrings(with_tokens)


class TextStream:
    """Nothing is given out that could still change: neither half a character nor what may be the beginning of a stop
    string. Of several stop strings the one that ends first counts, of those the longest; so the text does not depend on
    how it was divided into tokens.
    """

    def __init__(self, processor: TextProcessor, stop: StopRules, skip_special_tokens: bool) -> None:
        self._processor = processor
        self._stop = stop
        self._skip_special_tokens = skip_special_tokens
        self._token_ids: list[int] = []
        self._context_start = 0  # tokens from here on are decoded together, as a tokenizer may join neighbours
        self._read = 0  # tokens before here are wholly in `text`
        self._num_ahead = 0  # characters of `text` that are of later tokens
        self._num_given = 0
        self._state = self._state_with_tokens = 0  # of the automata of `_stop`
        self._is_finished = False
        self.has_stop_strings = stop.has_any  # then tokens are to come one by one
        self.text = ""
        self.is_stopped = False

    def push(self, token_ids: Sequence[int], can_stop: bool = True) -> None:
        """Takes the next tokens, at least one. `can_stop`: whether a stop string may end the text here."""
        self._token_ids.extend(token_ids)
        new = self._decode_new()
        certain = new.rstrip(UNFINISHED)
        self._take(certain[self._num_ahead :], can_stop)
        self._num_ahead = max(self._num_ahead, len(certain))
        if new and len(certain) == len(new):
            self._context_start, self._read, self._num_ahead = self._read, len(self._token_ids), 0
        if token_ids[-1] in self._stop.tokens and not self.is_stopped:
            self._take_token(token_ids[-1], new[len(certain) :], can_stop)

    def finish(self) -> None:
        """Ends the text: nothing is held back."""
        if not self.is_stopped:
            self._take(self._decode_new()[self._num_ahead :], can_stop=False)
        self._is_finished = True

    def give(self) -> str:
        """The text that has become certain since the last time."""
        end = len(self.text) - self._held_back()
        given = self.text[self._num_given : end]
        self._num_given = max(self._num_given, end)
        return given

    def _decode_new(self) -> str:
        old = self._decode(self._token_ids[self._context_start : self._read])
        return self._decode(self._token_ids[self._context_start :])[len(old) :]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._processor.decode(token_ids, self._skip_special_tokens) if token_ids else ""

    def _take(self, new: str, can_stop: bool) -> None:
        """New text, up to where a stop string in it ends the whole."""
        for place, character in enumerate(new if self._stop.has_any else ""):
            length = self._advance(character)
            if length is not None and can_stop:
                self.text += new[: place + 1]
                self._cut(length)
                return
        self.text += new

    def _take_token(self, token_id: int, unfinished: str, can_stop: bool) -> None:
        """A hidden token. unfinished: what stands before it that is no character yet, and is part of the text if that
        stops here.
        """
        for character in unfinished:
            self._state_with_tokens = self._stop.with_tokens.advance(self._state_with_tokens, character)
        length = self._advance(token_id)
        if length is not None and can_stop:
            self.text += unfinished
            self._cut(length)

    def _advance(self, symbol: Symbol) -> int | None:
        """One more symbol for the stop strings: how many characters of the text one has that ends here."""
        stop = self._stop
        if isinstance(symbol, str):
            self._state = stop.in_text.advance(self._state, symbol)
        self._state_with_tokens = stop.with_tokens.advance(self._state_with_tokens, symbol)
        in_text = stop.in_text.ending(self._state) if isinstance(symbol, str) else None
        with_tokens = stop.with_tokens.ending(self._state_with_tokens)
        return max((length for length in (in_text, with_tokens) if length is not None), default=None)

    def _cut(self, num_chars: int) -> None:
        self.text = self.text[: len(self.text) - num_chars]
        self.is_stopped = True

    def _held_back(self) -> int:
        if self._is_finished or self.is_stopped or not self._stop.has_any:
            return 0
        stop = self._stop
        return max(stop.in_text.held(self._state), stop.with_tokens.held(self._state_with_tokens))


def _symbols(string: str, tokens: dict[str, int]) -> list[Symbol]:
    """A stop string with the texts of these tokens as the tokens themselves; of several that begin at one place the
    longest.
    """
    symbols: list[Symbol] = []
    place = 0
    while place < len(string):
        found = max((text for text in tokens if string.startswith(text, place)), key=len, default="")
        symbols.append(tokens[found] if found else string[place])
        place += len(found) or 1
    return symbols
