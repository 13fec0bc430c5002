"""The rows that a talker is fed, computed of the thinker's: projections, and what stands around a text.

Legend: n rows, K tokens of the user's turns, E width of the thinker, D hidden size.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from vllm_omni.engine.ar.talker.inputs import TextRows
from vllm_omni.layers.weights import load_rows
from vllm_omni.models.qwen3_omni.talker import TEXT_EMBEDDINGS, Talker
from vllm_omni.models.qwen3_omni.talker_prompt import NUM_ROLE_TOKENS


class TalkerRows:
    """Of one loaded talker. The embeddings of three marks are read from the thinker's, row by row."""

    def __init__(
        self, model: Talker, folder: Path, device: torch.device, dtype: torch.dtype, variant: str | None
    ) -> None:
        self._model = model
        self._device, self._dtype = device, dtype
        marks = model.config.text
        tokens = [marks.begin, marks.end, marks.pad]
        embeddings = load_rows(folder, TEXT_EMBEDDINGS, tokens, model.config.thinker_size, variant)
        self._begin, self._end, self._pad = self.text(embeddings).unbind()

    @property
    def around(self) -> TextRows:
        """What stands behind a text."""
        return TextRows((), (self._end,), self._pad)

    @torch.inference_mode()
    def text(self, embeddings: Tensor) -> Tensor:
        """[n, E] of text tokens -> [n, D]."""
        return self._model.text_projection(embeddings.to(self._device, self._dtype))

    @torch.inference_mode()
    def prompt(self, embeddings: Tensor, states: Tensor, is_media: Tensor, reply: Tensor, speaker: int) -> Tensor:
        """embeddings, states: [K, E] of the user's turns; is_media: [K] bool; reply: [NUM_TEXT_BEFORE, D], the first
        rows of the assistant's turn; speaker: its code -> [K + NUM_BEGIN_TOKENS, D].
        """
        states = states.to(self._device, self._dtype)
        is_media = is_media.to(self._device)[:, None]
        heard = torch.where(is_media, self._model.hidden_projection(states), self.text(embeddings))
        codec = self._model.config.codec
        marks = [codec.no_think, codec.think_begin, codec.think_end, speaker, codec.pad, codec.begin]
        coded = self._model.codec_embedding(torch.tensor(marks, device=self._device))
        beside = torch.stack([*[self._pad] * 4, self._begin, reply[NUM_ROLE_TOKENS]])
        return torch.cat([heard, reply[:NUM_ROLE_TOKENS], beside + coded])
