"""How the talker's prompt is laid out: which text token and which code each of its rows is the sum of, and which text
rows follow, one for each frame that is written. Computes nothing.

Two layouts: the whole text before the first frame, or text and frames side by side, where the first frame is written
after the first text token: then the rest of the text may still be on its way. A recording whose words are known stands
there as if the talker had just spoken it, and as many text tokens beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import zip_longest

from vllm_omni.models.qwen3_tts.config import TalkerConfig

NUM_ROLE_TOKENS = 3  # what a turn begins with: mark, role, line break
NUM_WORD_ENDS, NUM_REFERENCE_ENDS = 5, 2  # what follows its words, with and without the turn behind


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a prompt; what is None adds nothing."""

    text: int | None = None  # a text token
    code: int | None = None  # of the first codebook
    frame: tuple[int, ...] | None = None  # all codes of a frame of the recording
    is_voice: bool = False  # whether a speaker's embedding is added


@dataclass(frozen=True, slots=True)
class Script:
    """What is to be said and how, in tokens."""

    role: Sequence[int]  # text tokens
    words: Sequence[int]
    instructions: Sequence[int] = ()
    language: int | None = None  # its code; None: left open
    speaker: int | None = None  # its code
    is_cloned: bool = False  # whether a speaker's embedding stands in the place of such a code
    reference: Sequence[int] = ()  # the recording's words, where its frames are to be in the prompt
    is_whole: bool = False  # whether all text stands before the first frame
    is_open: bool = False  # whether more words follow


@dataclass(frozen=True, slots=True)
class Layout:
    rows: list[Row] = field(default_factory=list)
    trailing: list[int] = field(default_factory=list)  # text tokens, one for each frame; padding follows


def lay_out(script: Script, config: TalkerConfig, frames: Sequence[tuple[int, ...]] = ()) -> Layout:
    """frames: of the recording, where the script has a `reference`. A script that is open has no fewer words than stand
    beside them.
    """
    codec, text = config.codec, config.text
    layout = Layout([Row(text=token) for token in (*script.instructions, *script.role)])
    before = _before(script, config)
    marks = [text.pad] * (len(before) - 1) + [text.begin]
    layout.rows.extend(Row(mark, row.code, is_voice=row.is_voice) for mark, row in zip(marks, before, strict=True))
    words = [*script.reference, *script.words, *([] if script.is_open else [text.end])]
    spoken = [Row(code=codec.begin), *(Row(frame=frame) for frame in frames)]
    if script.is_whole:
        layout.rows.extend(Row(token, codec.pad) for token in words)
        words = []
    beside = words[: len(spoken)]
    layout.rows.extend(
        Row(text.pad if token is None else token, row.code, row.frame) for row, token in zip_longest(spoken, beside)
    )
    layout.trailing.extend(words[len(spoken) :])
    return layout


def num_tokens_beside(num_frames: int) -> int:
    """Text tokens in the prompt of text and frames side by side: beside the recording's frames, and one before."""
    return num_frames + 1


def num_rows(script: Script, config: TalkerConfig, num_frames: int = 0) -> int:
    """Of the layout of a recording that has not been read."""
    return len(lay_out(script, config, [()] * num_frames).rows)


def content_id(text: int | None, codes: object) -> int:
    """What makes a row the same for the prefix cache. codes: whatever is added to the text, in a printable form."""
    return int.from_bytes(sha256(f"{text} {codes}".encode()).digest()[:31], "little")


def _before(script: Script, config: TalkerConfig) -> list[Row]:
    """Language, voice and padding, which come before anything is said."""
    codec = config.codec
    thinking = [codec.no_think] if script.language is None else [codec.think]
    named = [] if script.language is None else [script.language]
    rows = [Row(code=code) for code in (*thinking, codec.think_begin, *named, codec.think_end)]
    if script.is_cloned:
        rows.append(Row(is_voice=True))
    elif script.speaker is not None:
        rows.append(Row(code=script.speaker))
    return [*rows, Row(code=codec.pad)]
