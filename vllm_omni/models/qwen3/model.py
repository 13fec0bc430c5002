"""Qwen3, dense (arXiv 2505.09388), over a paged KV cache. Loads `Qwen3ForCausalLM` and `Qwen3Model` folders.

Legend: N tokens of a step, R of them, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vllm_omni.layers.decoder import Decoder, DecoderConfig, locate_fused
from vllm_omni.layers.forward_context import ForwardContext
from vllm_omni.layers.linear import Linear, linear
from vllm_omni.layers.weights import Target

HEAD_DIM = 128  # transformers' default, whatever hidden size and heads say


@dataclass(frozen=True, slots=True)
class Qwen3Config(DecoderConfig):
    """The decoder and what stands around it."""

    tie_word_embeddings: bool
    has_head: bool

    @property
    def can_write(self) -> bool:
        return self.has_head or self.tie_word_embeddings

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], where: str) -> Qwen3Config:
        """From a config.json of any age; ConfigError with the key for what is missing, wrong or not supported."""
        has_bias = bool(raw.get("attention_bias", False))
        return cls(
            **cls.fields_from(raw, where, HEAD_DIM),
            qkv_bias=has_bias,
            output_bias=has_bias,
            head_norms=True,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            has_head=raw.get("architectures") != ["Qwen3Model"],
        )


class Qwen3(nn.Module):
    """The model of one folder."""

    prompt_reader = None  # text alone

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.decoder = Decoder(config)
        has_own_head = config.has_head and not config.tie_word_embeddings
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False) if has_own_head else None

    @classmethod
    def read_config(cls, raw: Mapping[str, Any], where: str) -> Qwen3Config:
        return Qwen3Config.from_json(raw, where)

    def forward(self, token_ids: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        """See LanguageModel."""
        states: Tensor = self.decoder(self.embed_tokens(token_ids), positions, context)
        return states

    def compute_logits(self, states: Tensor) -> Tensor:
        """states: [R, D] after the final norm -> [R, V]."""
        return linear(states, self.embed_tokens.weight) if self.lm_head is None else self.lm_head(states)

    def locate(self, name: str) -> Target | None:
        """The parameter for a published name, with or without the `model.` prefix."""
        name = name.removeprefix("model.")
        is_around = name.startswith(("embed_tokens.", "lm_head."))
        return locate_fused(self, name if is_around else f"decoder.{name}")

    def is_ignored(self, name: str) -> bool:
        """The tied copy of the embeddings (or the head of a model that is used without one), and the frequencies of old
        files.
        """
        return (name == "lm_head.weight" and self.lm_head is None) or name.endswith("rotary_emb.inv_freq")
