"""The code predictor of Qwen3-TTS and Qwen3-Omni: a small Qwen3 decoder that reads a state of the talker and the first
code of a frame, and writes the other codes one after the other.

Legend: B frames, E width of the talker, D hidden size, V codes of a codebook, C codes that are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vllm_omni.errors import ConfigError
from vllm_omni.layers.decoder import Decoder, DecoderConfig, locate_fused
from vllm_omni.layers.forward_context import ForwardContext
from vllm_omni.layers.linear import Linear
from vllm_omni.layers.weights import Target
from vllm_omni.utils.checks import check_number

MAX_GROUPS = 64


@dataclass(frozen=True, slots=True)
class PredictorConfig(DecoderConfig):
    """The decoder that writes all codes of a frame but the first."""

    num_codes: int  # that it writes
    embedding_size: int  # of the codes that it is fed: the talker's hidden size

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], where: str, embedding_size: int) -> PredictorConfig:
        """raw: the code_predictor_config of a config.json, which stands at `where`; ConfigError."""
        has_bias = bool(raw.get("attention_bias", False))
        return cls(
            **cls.fields_from(raw, where, None),
            qkv_bias=has_bias,
            output_bias=has_bias,
            head_norms=True,
            num_codes=num_groups(raw, where) - 1,
            embedding_size=embedding_size,
        )


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


def num_groups(raw: Mapping[str, Any], where: str) -> int:
    """How many codes a frame has, from a config.json; ConfigError."""
    groups = raw.get("num_code_groups")
    check_number(f"{where}: num_code_groups", groups, 2, MAX_GROUPS, integer=True, raises=ConfigError)
    return int(raw["num_code_groups"])
