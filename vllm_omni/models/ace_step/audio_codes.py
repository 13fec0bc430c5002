"""The audio codes that ACE-Step's language model writes and its detokenizer reads, as text: '<|audio_code_12|>'."""

from __future__ import annotations

import re

CODE = re.compile(r"<\|audio_code_(\d{1,9})\|>")
CODES_ALONE = re.compile(rf"\s*(?:{CODE.pattern}\s*)+")


def find_codes(text: str) -> list[int]:
    """The number of every code in the text, in order."""
    return [int(number) for number in CODE.findall(text)]


def is_codes_alone(text: str) -> bool:
    """Whether the text is one code or more, and nothing else but white space."""
    return CODES_ALONE.fullmatch(text) is not None
