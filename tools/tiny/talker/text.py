"""The tokenizer of the small speaking model, byte-level BPE in which every word of the world is one token, and the text
tokens of every way to write a word.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from torch import Tensor

from tools.tiny.common.tokenizer import trained_tokenizer
from tools.tiny.speech.world import DIGITS, WORDS
from tools.tiny.talker.shapes import MARKS
from tools.tiny.talker.spoken import PADDING

VOCABULARY = 640  # the bytes, the words with and without a space before them and with a capital
ROLE, COMMA, STOPS = "<|im_start|>assistant\n", ",", (".", "!")


def words_tokenizer() -> Tokenizer:
    texts = [way for word in WORDS for way in (word, f" {word}", word.capitalize())]
    return trained_tokenizer([*texts, "assistant\nuser\n"], VOCABULARY, MARKS)


def encoded(tokenizer: Tokenizer) -> dict[str, Tensor]:
    """What `Spoken` holds of the tokenizer."""

    def tokens(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    ways = [tokens(way) for word in WORDS for way in spellings(word)]
    width = max(map(len, ways))
    rows = [way + [PADDING] * (width - len(way)) for way in ways]
    return {
        "spellings": torch.tensor(rows).view(len(WORDS), 3, 2, width),
        "comma": torch.tensor(tokenizer.token_to_id(COMMA)),
        "stops": torch.tensor([tokenizer.token_to_id(stop) for stop in STOPS]),
        "role": torch.tensor(tokens(ROLE)),
        "tokenizer": torch.tensor(list(tokenizer.to_str().encode()), dtype=torch.uint8),
        "vocab_size": torch.tensor(tokenizer.get_vocab_size()),
    }


def spellings(word: str) -> list[str]:
    """At the beginning, behind another word, with a capital; each in letters and as a figure."""
    figure = str(DIGITS.index(word)) if word in DIGITS else word
    return [word, figure, f" {word}", f" {figure}", word.capitalize(), figure.capitalize()]
