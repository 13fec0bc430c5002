"""What the talker hears of the thinker's prompt: the turns of the user, then the beginning of the assistant's reply
beside the marks of the speech. Computes no projection.

Legend: T tokens of the thinker's prompt, K of them that are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_omni.errors import StageError
from vllm_omni.models.qwen3_omni.talker_config import TurnMarks

NUM_ROLE_TOKENS = 3  # the mark of a turn, its role, the end of the line
NUM_BEGIN_TOKENS = 9  # rows of the assistant's turn before the first code
NUM_TEXT_BEFORE = NUM_ROLE_TOKENS + 1  # rows of the assistant's turn that these hold


@dataclass(frozen=True, slots=True, eq=False)
class HeardPrompt:
    """Places in the thinker's prompt, and positions in the talker's."""

    kept: Tensor  # [K] int64, tokens of the user's turns
    reply_start: int  # the first token of the assistant's turn, to which the reply belongs
    positions: Tensor  # [3, K + NUM_BEGIN_TOKENS]


def hear(token_ids: list[int], positions: Tensor, marks: TurnMarks) -> HeardPrompt:
    """positions: [3, T] of the thinker, on the CPU; StageError for a prompt whose last turn is not the assistant's.

    What is left out moves what stands behind it forward.
    """
    starts = [index for index, token in enumerate(token_ids[:-1]) if token == marks.start]
    if not starts or token_ids[starts[-1] + 1] != marks.assistant:
        raise StageError(
            "the thinker's prompt: got no turn of the assistant at its end, expected the model's own chat template; "
            "give chat messages, or text to which the template applies"
        )
    kept: list[int] = []
    parts: list[Tensor] = []
    position: float = 0
    for start, stop in zip(starts, starts[1:], strict=False):
        if token_ids[start + 1] == marks.user:
            kept += range(start, stop)
            first = positions[0, start].item()
            parts.append(positions[:, start:stop] - first + position)
            position += positions[0, stop].item() - first
    parts.append((torch.arange(NUM_BEGIN_TOKENS) + position).expand(3, -1))
    return HeardPrompt(torch.tensor(kept, dtype=torch.int64), starts[-1], torch.cat(parts, dim=1))
