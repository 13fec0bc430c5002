"""The talker of Qwen3-TTS: a dense Qwen3 decoder that writes the first code of each frame, 12.5 a second, its text
projection and its code predictor. Loads the `talker.*` tensors of the published checkpoints.

Legend: N tokens of a step, R of them, T text tokens, D hidden size, V codes of the first codebook and their marks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vllm_omni.layers.decoder import Decoder, locate_fused
from vllm_omni.layers.forward_context import ForwardContext
from vllm_omni.layers.linear import Linear
from vllm_omni.layers.weights import Target
from vllm_omni.models.qwen3_tts.config import TalkerConfig
from vllm_omni.worker.ar.frames.code_predictor import CodePredictor

PREDICTOR = "code_predictor"


class TextProjection(nn.Module):
    """From embeddings of the text to the talker's width."""

    def __init__(self, text_size: int, size: int) -> None:
        super().__init__()
        self.linear_fc1 = Linear(text_size, text_size)
        self.linear_fc2 = Linear(text_size, size)

    def forward(self, embeddings: Tensor) -> Tensor:
        projected: Tensor = self.linear_fc2(F.silu(self.linear_fc1(embeddings)))
        return projected


class Talker(nn.Module):
    """The talker of one folder. Its tokens are first codes; the prompt's stand for rows, and what joins written ones
    comes as rows too: `context.input_rows` [.., D].
    """

    prompt_reader = None  # what its prompts hold is no chat
    text_only = None
    other_parts = ()
    is_capturable = False  # it is fed rows in every step

    def __init__(self, config: TalkerConfig) -> None:
        super().__init__()
        self.config = config
        self.text_embedding = nn.Embedding(config.text_vocab_size, config.text_hidden_size)
        self.text_projection = TextProjection(config.text_hidden_size, config.hidden_size)
        self.codec_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.decoder = Decoder(config)
        self.codec_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.code_predictor = CodePredictor(config.predictor)

    @classmethod
    def read_config(cls, raw: Mapping[str, Any], where: str) -> TalkerConfig:
        return TalkerConfig.from_json(raw, where)

    def embed_text(self, token_ids: Tensor) -> Tensor:
        """token_ids: [T] of the text -> [T, D]."""
        rows: Tensor = self.text_projection(self.text_embedding(token_ids))
        return rows

    def forward(self, token_ids: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        """See LanguageModel."""
        embeddings = self.codec_embedding(token_ids)
        if context.input_rows is not None:
            embeddings = context.input_rows.merge(embeddings)
        states: Tensor = self.decoder(embeddings, positions, context)
        return states

    def compute_logits(self, states: Tensor) -> Tensor:
        """states: [R, D] after the final norm -> [R, V]."""
        logits: Tensor = self.codec_head(states)
        return logits

    def locate(self, name: str) -> Target | None:
        """The parameter for a published name."""
        name = name.removeprefix("talker.")
        if name.startswith(f"{PREDICTOR}."):
            found = self.code_predictor.locate(name.removeprefix(f"{PREDICTOR}."))
            return None if found is None else Target(f"{PREDICTOR}.{found.parameter}", found.rows)
        if name.startswith(("model.codec_embedding.", "model.text_embedding.")):
            return Target(name.removeprefix("model."))
        if name.startswith("model."):
            return locate_fused(self, f"decoder.{name.removeprefix('model.')}")
        return Target(name)

    def is_ignored(self, name: str) -> bool:
        """Buffers of old files."""
        return name.endswith(".inv_freq")
