"""What the talker is fed and what it is to write, for many sentences at once, in both layouts of the prompt.

Legend: S sentences, L positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tools.tiny.talker.foretelling import talker_config
from tools.tiny.talker.shapes import LANGUAGE, SPEAKER
from tools.tiny.talker.spoken import PADDING, Spoken, padded
from vllm_omni.models.qwen3_tts.prompt import Script, lay_out

BESIDE_EVERY = 4  # one sentence in so many has its text beside the frames
NAMED_EVERY = 5  # one in so many names its language
END = -2  # in the place of a frame that follows


@dataclass(frozen=True, slots=True)
class Lessons:
    """All int64 [S, L], PADDING where there is nothing."""

    text: Tensor  # text token of a position
    marks: Tensor  # mark of the first codebook, of a prompt
    frames: Tensor  # frame that is fed
    following: Tensor  # frame that is to be written after it, or END
    words: Tensor  # word that is being said by that

    @classmethod
    def of(cls, spoken: Spoken, device: torch.device) -> Lessons:
        columns: list[list[Tensor]] = [[] for _ in range(5)]
        for number in range(len(spoken.sentences)):
            for column, values in zip(columns, lesson(spoken, number), strict=True):
                column.append(torch.tensor(values))
        return cls(*(padded(column).to(device) for column in columns))

    def some(self, size: int) -> Lessons:
        """Random ones."""
        chosen = torch.randint(len(self.text), (size,), device=self.text.device)
        return Lessons(*(getattr(self, name)[chosen] for name in self.__slots__))


def lesson(spoken: Spoken, number: int) -> tuple[list[int], ...]:
    """The fields of one sentence, up to the position that writes the end."""
    config = talker_config(spoken.vocab_size)
    tokens, row = spoken.tokens[number], spoken.sentences[number]
    words = row[row >= 0].tolist()
    script = Script(
        role=spoken.role.tolist(),
        words=tokens[tokens >= 0].tolist(),
        language=config.languages[LANGUAGE] if number % NAMED_EVERY == 0 else None,
        speaker=config.speakers[SPEAKER],
        is_whole=number % BESIDE_EVERY != 0,
    )
    layout, frames = lay_out(script, config), spoken.frames(words)
    prompt, silent = layout.rows, [PADDING] * (len(layout.rows) - 1)
    beside = [*layout.trailing, *[config.text.pad] * len(frames)][: len(frames)]
    return (
        [PADDING if one.text is None else one.text for one in prompt] + beside,
        [PADDING if one.code is None else one.code for one in prompt] + [PADDING] * len(frames),
        [PADDING] * len(prompt) + frames,
        [*silent, *frames, END],
        [*silent, *spoken.said(words), PADDING],
    )
