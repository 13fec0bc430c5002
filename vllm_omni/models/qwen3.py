"""Qwen3, dense (arXiv 2505.09388), with fused projections over a paged KV cache. Loads `Qwen3ForCausalLM` and
`Qwen3Model` folders.

Legend: N tokens of a step, D hidden size, H query heads, K key-value heads, d head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vllm_omni.errors import ConfigError
from vllm_omni.layers.linear import MergedLinear
from vllm_omni.layers.norm import RMSNorm
from vllm_omni.layers.rotary import RotaryEmbedding, rotary_frequencies, rotate
from vllm_omni.models.language_model import ForwardContext
from vllm_omni.models.loader import Target
from vllm_omni.utils.checks import check_number

FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


@dataclass(frozen=True, slots=True)
class Qwen3Config:
    """What of a config.json shapes the computation. rope: the keys of `rope_parameters`, `rope_type` and `rope_theta`
    always among them.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Mapping[str, Any]
    attention_bias: bool
    tie_word_embeddings: bool
    has_head: bool

    @property
    def can_write(self) -> bool:
        return self.has_head or self.tie_word_embeddings

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], where: str) -> Qwen3Config:
        """From a config.json of any age; ConfigError with the key for what is missing, wrong or not supported."""
        _refuse_unsupported(raw, where)
        heads = _count(raw, "num_attention_heads", where)
        head_dim = raw.get("head_dim", 128)  # transformers' default, whatever hidden size and heads say
        sizes = {"num_key_value_heads": heads, **{k: v for k, v in raw.items() if v is not None}}
        config = cls(
            vocab_size=_count(raw, "vocab_size", where),
            hidden_size=_count(raw, "hidden_size", where),
            intermediate_size=_count(raw, "intermediate_size", where),
            num_layers=_count(raw, "num_hidden_layers", where),
            num_heads=heads,
            num_kv_heads=_count(sizes, "num_key_value_heads", where),
            head_dim=_count(raw, "hidden_size", where) // heads
            if head_dim is None
            else _count({"head_dim": head_dim}, "head_dim", where),
            max_position_embeddings=_count({"max_position_embeddings": 32768, **raw}, "max_position_embeddings", where),
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope=_rope(raw, where),
            attention_bias=bool(raw.get("attention_bias", False)),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            has_head=raw.get("architectures") != ["Qwen3Model"],
        )
        if config.num_heads % config.num_kv_heads or config.head_dim % 2:
            raise ConfigError(
                f"{where}: got {config.num_heads} heads, {config.num_kv_heads} key-value heads and head_dim "
                f"{config.head_dim}, expected whole groups and an even head_dim"
            )
        rotary_frequencies(config.head_dim, config.max_position_embeddings, config.rope)
        return config


class Qwen3(nn.Module):
    """The model of one folder. Names of parameters follow `Qwen3Model`, fused projections apart."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Qwen3Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config.head_dim, config.max_position_embeddings, config.rope)
        has_own_head = config.has_head and not config.tie_word_embeddings
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False) if has_own_head else None

    @classmethod
    def read_config(cls, raw: Mapping[str, Any], where: str) -> Qwen3Config:
        return Qwen3Config.from_json(raw, where)

    def forward(self, token_ids: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        """token_ids, positions: [N] int64 -> [N, D]: normed when all layers run, else the state after the last that
        did.
        """
        states = self.embed_tokens(token_ids)
        context.tap(0, states)
        cos, sin = self.rotary(positions, states.dtype)
        for index in range(context.num_layers):
            states = self.layers[index](states, cos, sin, context, index)
            if index + 1 < self.config.num_layers:
                context.tap(index + 1, states)
        if context.num_layers == self.config.num_layers:
            states = self.norm(states)
            context.tap(context.num_layers, states)
        return states

    def compute_logits(self, states: Tensor) -> Tensor:
        """states: [R, D] after the final norm -> [R, V]."""
        return F.linear(states, self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight)

    def locate(self, name: str) -> Target | None:
        """The parameter for a published name, with or without the `model.` prefix."""
        name = name.removeprefix("model.")
        *path, module, kind = name.split(".") if name.count(".") >= 1 else ("", name)
        if module not in FUSED:
            return Target(name)
        owner = ".".join([*path, FUSED[module]])
        try:
            merged = self.get_submodule(owner)
        except AttributeError:
            return None
        return Target(f"{owner}.{kind}", merged.rows(module)) if isinstance(merged, MergedLinear) else None

    def is_ignored(self, name: str) -> bool:
        """The tied copy of the embeddings (or the head of a model that is used without one), and the frequencies of old
        files.
        """
        return (name == "lm_head.weight" and self.lm_head is None) or name.endswith("rotary_emb.inv_freq")


class Qwen3Layer(nn.Module):
    """One decoder layer: attention and MLP, each after a norm and around a residual."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Qwen3Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Qwen3MLP(config)

    def forward(self, states: Tensor, cos: Tensor, sin: Tensor, context: ForwardContext, index: int) -> Tensor:
        states = states + self.self_attn(self.input_layernorm(states), cos, sin, context, index)
        return states + self.mlp(self.post_attention_layernorm(states))


class Qwen3Attention(nn.Module):
    """Grouped-query attention with norms on the heads of queries and keys."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        parts = {"q_proj": query, "k_proj": key, "v_proj": key}
        self.qkv_proj = MergedLinear(config.hidden_size, parts, bias=config.attention_bias)
        self.o_proj = nn.Linear(query, config.hidden_size, bias=config.attention_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, states: Tensor, cos: Tensor, sin: Tensor, context: ForwardContext, index: int) -> Tensor:
        query, key, value = (x.view(len(x), -1, self.head_dim) for x in self.qkv_proj.project(states))
        query = rotate(self.q_norm(query), cos, sin)  # [N, H, d]; key and value [N, K, d]
        key = rotate(self.k_norm(key), cos, sin)
        attended = context.attention(query, key, value, context.kv_cache[index])
        return self.o_proj(attended.flatten(1))


class Qwen3MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        parts = {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
        self.gate_up_proj = MergedLinear(config.hidden_size, parts)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        gate, up = self.gate_up_proj.project(states)
        return self.down_proj(F.silu(gate) * up)


def _count(raw: Mapping[str, Any], key: str, where: str) -> int:
    complaint = check_number(f"{where}: {key}", raw.get(key), 1, integer=True)
    if complaint:
        raise ConfigError(complaint)
    return int(raw[key])


def _refuse_unsupported(raw: Mapping[str, Any], where: str) -> None:
    expected: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("silu",),
        "use_sliding_window": (False, None),
        "quantization_config": (None,),
        "partial_rotary_factor": (1, None),
    }
    for key, values in expected.items():
        if key in raw and raw[key] not in values:
            raise ConfigError(f"{where}: {key}: got {raw[key]!r}, expected {values[0]!r}; nothing else is supported")
    others = set(raw.get("layer_types") or ()) - {"full_attention"}
    if others:
        raise ConfigError(
            f"{where}: layer_types: got {sorted(others)}, expected 'full_attention' alone; nothing else is supported"
        )


def _rope(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"{where}: rope_parameters: got {rope!r}, expected an object")
    rope = {"rope_theta": raw.get("rope_theta", 10000.0), **rope}
    _refuse_unsupported({"partial_rotary_factor": rope.get("partial_rotary_factor")}, where)
    rope["rope_type"] = rope.get("rope_type", rope.pop("type", "default"))
    complaint = check_number(f"{where}: rope_theta", rope["rope_theta"], 0, above_low=True)
    if complaint:
        raise ConfigError(complaint)
    return rope
