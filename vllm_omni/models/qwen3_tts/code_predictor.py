"""The code predictor of Qwen3-TTS and Qwen3-Omni: a small Qwen3 decoder that reads a state of the talker and the first
code of a frame, and writes the other codes one after the other.

Legend: B frames, E width of the talker, D hidden size, V codes of a codebook, C codes that are written.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vllm_omni.layers.decoder import Decoder, locate_fused
from vllm_omni.layers.forward_context import ForwardContext
from vllm_omni.layers.linear import Linear
from vllm_omni.layers.weights import Target
from vllm_omni.models.qwen3_tts.config import PredictorConfig


class CodePredictor(nn.Module):
    """Codebook 0 here is the second of the frame: the first that is written."""

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        self.config = config
        self.codec_embedding = nn.Embedding(config.num_codes * config.vocab_size, config.embedding_size)  # of all books
        is_narrow = config.embedding_size != config.hidden_size
        self.small_to_mtp_projection = Linear(config.embedding_size, config.hidden_size) if is_narrow else None
        self.decoder = Decoder(config)
        self.lm_head = nn.ModuleList(
            Linear(config.hidden_size, config.vocab_size, bias=False) for _ in range(config.num_codes)
        )

    def embed(self, codes: Tensor, codebook: int) -> Tensor:
        """codes: [B] of one codebook -> [B, E]."""
        embedded: Tensor = self.codec_embedding(codes + codebook * self.config.vocab_size)
        return embedded

    def summed_rows(self, codes: Tensor) -> Tensor:
        """codes: [B, C] -> [B, E], the sum of their embeddings."""
        offsets = torch.arange(self.config.num_codes, device=codes.device) * self.config.vocab_size
        summed: Tensor = self.codec_embedding(codes + offsets).sum(1)
        return summed

    def forward(self, rows: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        """rows: [N, E]; positions: [N] int64 -> [N, D] after the final norm."""
        states = rows if self.small_to_mtp_projection is None else self.small_to_mtp_projection(rows)
        written: Tensor = self.decoder(states, positions, context)
        return written

    def locate(self, name: str) -> Target | None:
        """The parameter for a published name, without the predictor's own beginning."""
        parts = name.split(".")
        if name.startswith("model.codec_embedding.") and len(parts) == 4 and parts[2].isdecimal():
            first = int(parts[2]) * self.config.vocab_size
            return Target("codec_embedding.weight", slice(first, first + self.config.vocab_size))
        if name.startswith("model."):
            return locate_fused(self, f"decoder.{name.removeprefix('model.')}")
        return Target(name)
