"""The pre-norm transformer decoder over a paged KV cache, its projections fused: grouped-query attention and SwiGLU
between RMS norms. What a family has of its own (biases, norms on heads) its config says.

Legend: N tokens of a step, R of them whose last states are wanted, D hidden size, H query heads, K key-value heads, d
head size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

from torch import Tensor, nn

from vllm_omni.errors import ConfigError
from vllm_omni.layers.blocks import Blocks
from vllm_omni.layers.forward_context import ForwardContext
from vllm_omni.layers.heads import placed_rows
from vllm_omni.layers.layer_windows import NO_WINDOWS, common_window
from vllm_omni.layers.linear import MergedLinear, RowLinear
from vllm_omni.layers.lora import acting
from vllm_omni.layers.native.decoder import LayerParts, NativeLayers
from vllm_omni.layers.norm import RMSNorm
from vllm_omni.layers.published_quantization import read_quantization
from vllm_omni.layers.rope_config import num_positions, override_rope, read_rope, scaled_beyond
from vllm_omni.layers.rotary import RotaryEmbedding, rotary_frequencies
from vllm_omni.layers.shard import WHOLE, Shard
from vllm_omni.layers.token_inputs import DeepRows
from vllm_omni.layers.weights import Target, locate_merged
from vllm_omni.utils.checks import check_number

FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
MAX_COUNT = 2**31 - 1
MAX_COUNTS = {"head_dim": 2**16}  # what planning makes tensors of
Config = TypeVar("Config", bound="DecoderConfig")
MAX_LAYERS = 10_000  # families make a row for each before anything is loaded
MakeMLP = Callable[[int], nn.Module]
PLAIN_ROPE: Mapping[str, Any] = {"rope_theta": 10000.0}
OMNI_ROPE: Mapping[str, Any] = {"rope_theta": 1000000.0, "mrope_section": (16, 24, 24)}


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """What of a config.json shapes the layers."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Mapping[str, Any]  # the keys of `rope_parameters`, `rope_type` and `rope_theta` always among them
    qkv_bias: bool
    output_bias: bool
    head_norms: bool  # whether queries and keys are normed head by head
    mlp_bias: bool = field(default=False, kw_only=True)
    windows: tuple[int | None, ...] = field(default=NO_WINDOWS, kw_only=True)  # by layer; empty: none has one

    @classmethod
    def fields_from(
        cls,
        raw: Mapping[str, Any],
        where: str,
        head_dim: int | None,
        rope: Mapping[str, Any] = PLAIN_ROPE,
        own_keys: Collection[str] = (),
    ) -> dict[str, Any]:
        """The fields of this class that a config.json of any age gives, the biases and norms apart; ConfigError with
        the key for what is missing, wrong or not supported. head_dim: where the file has none, None for an equal share.
        rope: the keys that the file leaves out, as transformers has them for this family. own_keys: what the family
        reads itself and would be refused otherwise.
        """
        _refuse_unsupported({key: value for key, value in raw.items() if key not in own_keys}, where)
        read_quantization(raw, where)
        heads = count_of(raw, "num_attention_heads", where)
        check_number(
            f"{where}: num_hidden_layers", raw.get("num_hidden_layers"), 1, MAX_LAYERS, integer=True, raises=ConfigError
        )
        head_dim = raw.get("head_dim", head_dim)
        sizes = {"num_key_value_heads": heads, **{k: v for k, v in raw.items() if v is not None}}
        fields: dict[str, Any] = {
            "vocab_size": count_of(raw, "vocab_size", where),
            "hidden_size": count_of(raw, "hidden_size", where),
            "intermediate_size": count_of(raw, "intermediate_size", where),
            "num_layers": count_of(raw, "num_hidden_layers", where),
            "num_heads": heads,
            "num_kv_heads": count_of(sizes, "num_key_value_heads", where),
            "head_dim": count_of(raw, "hidden_size", where) // heads
            if head_dim is None
            else count_of({"head_dim": head_dim}, "head_dim", where),
            "max_position_embeddings": count_of(
                {"max_position_embeddings": 32768, **raw}, "max_position_embeddings", where
            ),
            "rms_norm_eps": _epsilon(raw, where),
            "rope": read_rope(raw, where, rope),
        }
        if heads % fields["num_kv_heads"] or fields["head_dim"] % 2:
            raise ConfigError(
                f"{where}: got {heads} heads, {fields['num_kv_heads']} key-value heads and head_dim "
                f"{fields['head_dim']}, expected whole groups and an even head_dim"
            )
        rotary_frequencies(fields["head_dim"], fields["max_position_embeddings"], fields["rope"])
        return fields

    def with_rope_scaling(self: Config, scaling: Mapping[str, Any]) -> Config:
        """The same with another scaling of its positions: `rope_type` and the keys of that type."""
        rope = override_rope(self.rope, scaling)
        rotary_frequencies(self.head_dim, self.max_position_embeddings, rope, "rope_scaling")
        return dataclasses.replace(self, rope=rope)

    @property
    def shared_counts(self) -> dict[str, int]:
        """What ranks share that compute this decoder together, by name."""
        return {
            "attention heads": self.num_heads,
            "key-value heads": self.num_kv_heads,
            "intermediate widths": self.intermediate_size,
        }

    @property
    def window(self) -> int | None:
        """How many tokens up to its own any token sees in any layer; None where a layer sees all of them."""
        return common_window(self.windows)

    @property
    def num_positions(self) -> int:
        """How many tokens a sequence may have, scaling included."""
        return num_positions(self.rope, self.max_position_embeddings)

    @property
    def scaled_beyond(self) -> int | None:
        """The length of a sequence from which on what its tokens are depends on it; None where it never does."""
        return scaled_beyond(self.rope, self.max_position_embeddings)


class Decoder(nn.Module):
    """All layers and the final norm. Names of parameters follow transformers' models, fused projections apart.

    make_mlp: what stands behind attention in the layer of an index, [N, D] -> [N, D]; None: a DecoderMLP in each.
    shard: this rank's share of heads and of the MLPs' widths; states between layers are whole on every rank.
    """

    def __init__(self, config: DecoderConfig, make_mlp: MakeMLP | None = None, shard: Shard = WHOLE) -> None:
        super().__init__()
        self.config = config
        mlps = [
            DecoderMLP(config, shard=shard) if make_mlp is None else make_mlp(index)
            for index in range(config.num_layers)
        ]
        windows = config.windows or (None,) * config.num_layers
        self.layers = Blocks(
            DecoderLayer(config, mlp, window, shard) for mlp, window in zip(mlps, windows, strict=True)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config.head_dim, config.max_position_embeddings, config.rope)
        self._native_layers: NativeLayers | Literal[False] | None = False

    def forward(
        self, states: Tensor, positions: Tensor, context: ForwardContext, deep: DeepRows | None = None
    ) -> Tensor:
        """states: [N, D]; positions: [N] or [3, N]; deep: what joins the states behind the first layers -> [R, D]:
        normed when all layers run, else the state after the last that did. A tapped state is that before the joining.
        """
        context.tap(0, states)
        cut = self._cut(context, deep)
        whole, last = (dataclasses.replace(context, wanted_rows=rows) for rows in (None, cut))
        if context.followers is not None:
            context.followers.follow(states, positions, last)
        cos, sin = self.rotary(positions, states.dtype, context.rope_lengths)
        runs_natively = context.attention.runs_layers and acting() is None  # adapters act on layers one by one
        native = self.native() if runs_natively else None
        done = 0
        for stop in self._stops(context, deep):
            of_layer = last if stop == context.num_layers else whole
            if native is not None:
                metadata, wanted = context.attention.metadata, of_layer.wanted_rows
                states = native.run(done, stop, states, cos, sin, metadata, context.kv_cache, wanted)
            else:
                for index, layer in enumerate(self.layers.present(done, stop), done):
                    states = layer(states, cos, sin, of_layer if index + 1 == stop else whole, index)
            done = stop
            if stop < self.config.num_layers:
                context.tap(stop, states)
            if deep is not None:
                states = deep.add(stop, states)
        if context.num_layers == self.config.num_layers:
            states = self.norm(states)
            context.tap(context.num_layers, states)
        return states if cut is not None else context.wanted(states)

    def _cut(self, context: ForwardContext, deep: DeepRows | None) -> Tensor | None:
        """The wanted rows, where the last layer that runs may compute them alone behind its keys and values; None
        where something needs all of its rows, as adapters, which know those of a whole step, do.
        """
        last = context.num_layers
        needs_all = context.taps_all(last) or (deep is not None and last in deep.stops) or acting() is not None
        return None if needs_all or last == 0 else context.wanted_rows

    def _stops(self, context: ForwardContext, deep: DeepRows | None) -> list[int]:
        """Behind which layers something is to be done."""
        stops = context.stops(self.config.num_layers)
        return stops if deep is None else sorted({*stops, *(x for x in deep.stops if x < context.num_layers)})

    def native(self) -> NativeLayers | None:
        """What runs all layers in one call, where their weights are packed for that; looked for once."""
        if self._native_layers is False:
            config = self.config
            parts = [cast(DecoderLayer, layer).parts() for layer in self.layers]
            known = [part for part in parts if part is not None]
            heads = config.num_heads, config.num_kv_heads, config.head_dim
            self._native_layers = (
                NativeLayers.find(known, *heads, config.rms_norm_eps) if len(known) == len(parts) else None
            )
        return self._native_layers


class DecoderLayer(nn.Module):
    """Attention and MLP, each after a norm and around a residual."""

    def __init__(self, config: DecoderConfig, mlp: nn.Module, window: int | None, shard: Shard) -> None:
        super().__init__()
        self.shard = shard
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = DecoderAttention(config, window, shard)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = mlp

    def forward(self, states: Tensor, cos: Tensor, sin: Tensor, context: ForwardContext, index: int) -> Tensor:
        """states: [N, D] -> [N, D], or [R, D] of the rows that the context wants, which alone go on behind the keys and
        values.
        """
        attended = self.self_attn(self.input_layernorm(states), cos, sin, context, index)
        states = context.wanted(states)
        states, normed = self.post_attention_layernorm.after_sum(states, attended)
        return states + self.mlp(normed)

    def parts(self) -> LayerParts | None:
        """For kernels that run whole layers; None with another MLP than they know, and where ranks sum within them."""
        attention, mlp = self.self_attn, self.mlp
        if type(mlp) is not DecoderMLP or not self.shard.is_whole:
            return None
        return LayerParts(
            self.input_layernorm.weight,
            None if attention.q_norm is None else attention.q_norm.weight,
            None if attention.k_norm is None else attention.k_norm.weight,
            self.post_attention_layernorm.weight,
            attention.qkv_proj,
            attention.o_proj,
            mlp.gate_up_proj,
            mlp.down_proj,
            attention.window,
        )


class DecoderAttention(nn.Module):
    """Grouped-query attention, within a window or of everything before."""

    def __init__(self, config: DecoderConfig, window: int | None, shard: Shard) -> None:
        super().__init__()
        self.num_heads = shard.part(config.num_heads), shard.part(config.num_kv_heads)  # of this rank
        self.window = window
        query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        parts = {"q_proj": query, "k_proj": key, "v_proj": key}
        self.qkv_proj = MergedLinear(config.hidden_size, parts, bias=config.qkv_bias, can_quantize=True, shard=shard)
        self.o_proj = RowLinear(query, config.hidden_size, bias=config.output_bias, can_quantize=True, shard=shard)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.head_norms else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.head_norms else None

    def forward(self, states: Tensor, cos: Tensor, sin: Tensor, context: ForwardContext, index: int) -> Tensor:
        norms = None if self.q_norm is None or self.k_norm is None else (self.q_norm, self.k_norm)
        query, key, value = placed_rows(self.qkv_proj(states), *self.num_heads, norms, cos, sin)
        attended = context.attention(query, key, value, context.kv_cache[index], self.window)
        return self.o_proj(context.wanted(attended).flatten(1))


class DecoderMLP(nn.Module):
    """SwiGLU. intermediate_size: another than the config's. is_summed: as a RowLinear's, of what it gives."""

    def __init__(
        self,
        config: DecoderConfig,
        intermediate_size: int | None = None,
        *,
        shard: Shard = WHOLE,
        is_summed: bool = True,
    ) -> None:
        super().__init__()
        width = config.intermediate_size if intermediate_size is None else intermediate_size
        parts, size, bias = {"gate_proj": width, "up_proj": width}, config.hidden_size, config.mlp_bias
        self.gate_up_proj = MergedLinear(size, parts, bias=bias, can_quantize=True, activation="swiglu", shard=shard)
        self.down_proj = RowLinear(width, size, bias=bias, can_quantize=True, shard=shard, is_summed=is_summed)

    def forward(self, states: Tensor) -> Tensor:
        return self.down_proj(self.gate_up_proj(states))


def locate_fused(model: nn.Module, name: str) -> Target | None:
    """The parameter of `model` for a published name, where the decoder's projections are fused."""
    return locate_merged(model, name, FUSED)


def sub_config(raw: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """An object inside a config.json."""
    inner = raw.get(key)
    if not isinstance(inner, Mapping):
        raise ConfigError(f"{where}: {key}: got {type(inner).__name__}, expected an object")
    return inner


def count_of(raw: Mapping[str, Any], key: str, where: str) -> int:
    """A positive integer of a config.json."""
    check_number(f"{where}: {key}", raw.get(key), 1, MAX_COUNTS.get(key, MAX_COUNT), integer=True, raises=ConfigError)
    return int(raw[key])


def _refuse_unsupported(raw: Mapping[str, Any], where: str) -> None:
    expected: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("silu",),
        "use_sliding_window": (False, None),
        "partial_rotary_factor": (1, None),
        "mlp_bias": (False, None),
    }
    for key, values in expected.items():
        if key in raw and raw[key] not in values:
            raise ConfigError(f"{where}: {key}: got {raw[key]!r}, expected {values[0]!r}; nothing else is supported")
    others = set(raw.get("layer_types") or ()) - {"full_attention"}
    if others:
        raise ConfigError(
            f"{where}: layer_types: got {sorted(others)}, expected 'full_attention' alone; nothing else is supported"
        )


def _epsilon(raw: Mapping[str, Any], where: str) -> float:
    epsilon = raw.get("rms_norm_eps", 1e-6)
    check_number(f"{where}: rms_norm_eps", epsilon, 0, raises=ConfigError)
    return float(epsilon)
