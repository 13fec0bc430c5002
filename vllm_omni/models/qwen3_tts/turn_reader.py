"""The turn of a speech whose text comes in pieces, as tokens: those of the whole text, wherever it is cut.

A piece is read up to its last sure cut, and the rest is held back until the next one. Such a cut is before white space
that follows something else, and before a mark that follows a letter or a digit: a match of the pattern by which Qwen's
tokenizer splits a text ends there whatever follows, and no special token holds white space or one of these marks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.models.qwen3_tts.prompt import NUM_WORD_ENDS
from vllm_omni.models.qwen3_tts.request import TURN_BEGIN, TURN_END, Encode, check_chars, check_words

SPACES = frozenset(" \t\u3000")  # a line break may belong to the mark before it
MARKS = frozenset(".,;:!?…。，；：！？、")  # Latin, then Chinese and Japanese


class TurnReader:
    """Of one request."""

    def __init__(self, encode: Encode, limits: LimitsConfig) -> None:
        self._encode = encode
        self._limits = limits
        self._held: list[str] = []  # what has come and is not read; the turn's begin before its first words
        self._num_chars = 0
        self._has_words = False
        self._has_begun = False

    def read(self, piece: str, is_last: bool) -> Tensor:
        """[n] int64: tokens of the turn up to its words' end. InvalidRequestError for too long a text, and for one
        without words.
        """
        self._num_chars += len(piece)
        check_chars("prompt", self._num_chars, self._limits)
        self._has_words = self._has_words or bool(piece.strip())
        before = self._held[-1][-1] if self._held else ""
        cut = len(piece) if is_last else _last_cut(before + piece) - len(before)
        if is_last and not self._has_words:
            check_words("")
        if not is_last and (cut < 0 or not before + piece[:cut]):
            self._held += [piece] if piece else []
            return torch.empty(0, dtype=torch.int64)
        words = "".join(self._held) + piece[:cut]
        self._held = [piece[cut:]] if piece[cut:] else []
        return torch.tensor(self._tokens(words, is_last), dtype=torch.int64)

    def _tokens(self, words: str, is_last: bool) -> list[int]:
        begin, self._has_begun = "" if self._has_begun else TURN_BEGIN, True
        tokens = self._encode(f"{begin}{words}{TURN_END if is_last else ''}")
        return tokens[:-NUM_WORD_ENDS] if is_last else tokens


def _last_cut(text: str) -> int:
    """The last place, above 0, before which the text can be read whatever follows; 0 where there is none."""
    return next((at for at in range(len(text) - 1, 0, -1) if _is_cut(text[at - 1], text[at])), 0)


def _is_cut(before: str, behind: str) -> bool:
    return (behind in SPACES and not before.isspace()) or (behind in MARKS and before.isalnum())
