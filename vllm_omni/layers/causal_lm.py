"""A language model: embeddings, the decoder, a head. A family is a config that says how its decoder is built.

Legend: N tokens of a step, R of them, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from vllm_omni.layers.decoder import Decoder, DecoderConfig, MakeMLP, locate_fused, sub_config
from vllm_omni.layers.forward_context import ForwardContext
from vllm_omni.layers.linear import Embedding, Linear
from vllm_omni.layers.shard import WHOLE, Shard
from vllm_omni.layers.weights import Target


@dataclass(frozen=True, slots=True)
class CausalLMConfig(DecoderConfig):
    """The decoder and what stands around it."""

    tie_word_embeddings: bool  # whether the embeddings are the head
    has_head: bool  # whether the folder holds a head of its own, where they are not

    @property
    def can_write(self) -> bool:
        return self.has_head or self.tie_word_embeddings

    @staticmethod
    def head_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of this class, from a config.json: base models (`Qwen3Model`) have no head."""
        architectures = raw.get("architectures") or [""]
        return {
            "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
            "has_head": not str(architectures[0]).endswith("Model"),
        }


class CausalLM(nn.Module):
    """The model of one folder."""

    prompt_reader: ClassVar[type[Any] | None] = None  # text alone
    text_only: ClassVar[type[CausalLM] | None] = None
    other_parts: ClassVar[tuple[str, ...]] = ()  # how published names begin that belong to other models of the folder
    is_capturable: ClassVar[bool] = True
    joins_rows: ClassVar[bool] = False
    can_shard: ClassVar[bool] = False  # whether the constructor takes a `shard` besides its config

    def __init__(self, config: CausalLMConfig, make_mlp: MakeMLP | None = None, shard: Shard = WHOLE) -> None:
        """make_mlp, shard: as a Decoder's."""
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, is_head=config.tie_word_embeddings)
        self.decoder = Decoder(config, make_mlp, shard)
        has_own_head = config.has_head and not config.tie_word_embeddings
        head = Linear(config.hidden_size, config.vocab_size, bias=False, can_quantize=True) if has_own_head else None
        self.lm_head = head

    def forward(self, token_ids: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        """As of a LanguageModel."""
        embeddings, deep = self.embed_tokens(token_ids), None
        if context.input_rows is not None:
            rows, deep = context.input_rows.split(self.config.hidden_size)
            embeddings = rows.merge(embeddings)
        states: Tensor = self.decoder(embeddings, positions, context, deep)
        return states

    def compute_logits(self, states: Tensor) -> Tensor:
        """states: [R, D] after the final norm -> [R, V]."""
        return self.embed_tokens.compute_logits(states) if self.lm_head is None else self.lm_head(states)

    def locate(self, name: str) -> Target | None:
        """The parameter for a published name, with or without the `model.` prefix."""
        name = name.removeprefix("model.")
        is_around = name.startswith(("embed_tokens.", "lm_head."))
        return locate_fused(self, name if is_around else f"decoder.{name}")

    def is_ignored(self, name: str) -> bool:
        """The tied copy of the embeddings (or the head of a model that is used without one), the frequencies of old
        files, and other models of the folder.
        """
        is_tied = name == "lm_head.weight" and self.lm_head is None
        return is_tied or name.endswith("rotary_emb.inv_freq") or name.startswith(self.other_parts)


class TextPart(CausalLM):
    """The language model of a checkpoint that holds a vision encoder besides, for text alone: its positions are those
    of a plain model, since text advances all axes together.
    """

    other_parts: ClassVar[tuple[str, ...]] = ("visual.", "model.visual.")

    def locate(self, name: str) -> Target | None:
        """The parameter for a published name, old (`model.`) or new (`model.language_model.`)."""
        return super().locate(name.removeprefix("model.").removeprefix("language_model."))

    @staticmethod
    def text_config(raw: Mapping[str, Any], where: str, has_axes: bool = False) -> tuple[dict[str, Any], str]:
        """What a config.json says of the language model, and where: early files have no `text_config`. Whether the
        embeddings are the head stands in either place. has_axes: whether its positions have three axes.
        """
        inner = raw if raw.get("text_config") is None else sub_config(raw, "text_config", where)
        is_tied = bool(raw.get("tie_word_embeddings") or inner.get("tie_word_embeddings"))
        text = {**inner, "architectures": raw.get("architectures"), "tie_word_embeddings": is_tied}
        for key in () if has_axes else ("rope_parameters", "rope_scaling"):
            if isinstance(text.get(key), Mapping):
                text[key] = {k: v for k, v in text[key].items() if not k.startswith("mrope_")}
        return text, where if inner is raw else f"{where}: text_config"
