"""The talker of Qwen3-TTS: a dense Qwen3 decoder that writes the first code of each frame, 12.5 a second, its text
projection and its code predictor. Loads the `talker.*` tensors of the published checkpoints.

Legend: T text tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vllm_omni.models.qwen3_tts.config import TalkerConfig
from vllm_omni.worker.ar.frames.talker import FrameTalker, Projection


class Talker(FrameTalker):
    """The talker of one folder."""

    embeddings = ("codec_embedding", "text_embedding")

    def __init__(self, config: TalkerConfig) -> None:
        super().__init__(config, config.predictor)
        self.config = config
        self.text_embedding = nn.Embedding(config.text_vocab_size, config.text_hidden_size)
        self.text_projection = Projection(config.text_hidden_size, config.text_hidden_size, config.hidden_size)

    @classmethod
    def read_config(cls, raw: Mapping[str, Any], where: str) -> TalkerConfig:
        return TalkerConfig.from_json(raw, where)

    def embed_text(self, token_ids: Tensor) -> Tensor:
        """token_ids: [T] of the text -> [T, D]."""
        rows: Tensor = self.text_projection(self.text_embedding(token_ids))
        return rows
