"""What config files say of sparse experts, and the MLPs of a decoder that has them. What they compute is `moe`'s.

The keys are those of Qwen3-MoE (arXiv 2505.09388) and of Qwen2-MoE, whose shared expert computes every token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from vllm_omni.errors import ConfigError
from vllm_omni.layers.decoder import DecoderConfig, DecoderMLP, count_of
from vllm_omni.layers.moe import SparseMLP
from vllm_omni.utils.checks import brief, check_number

DEFAULTS: Mapping[str, Any] = {"num_experts_per_tok": 8, "moe_intermediate_size": 768, "decoder_sparse_step": 1}
MAX_EXPERTS = 4096


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """The MLPs of some layers of a decoder; the others have a plain one."""

    num_experts: int
    num_chosen: int  # experts of each token
    size: int  # the intermediate size of an expert
    normalises: bool  # whether the weights of the chosen experts sum to one
    sparse_layers: frozenset[int]
    shared_size: int = 0  # the intermediate size of an expert that computes every token; 0: there is none

    @classmethod
    def from_json(
        cls, raw: Mapping[str, Any], where: str, num_layers: int, defaults: Mapping[str, Any] = DEFAULTS
    ) -> ExpertsConfig:
        """ConfigError with the key for what is missing or wrong. defaults: transformers', where a file leaves keys
        out.
        """
        sizes = {**defaults, "num_experts": raw.get("num_local_experts", defaults.get("num_experts")), **raw}
        num_experts = count_of(sizes, "num_experts", where)
        num_chosen = count_of(sizes, "num_experts_per_tok", where)
        check_number(f"{where}: num_experts", num_experts, 1, MAX_EXPERTS, integer=True, raises=ConfigError)
        check_number(f"{where}: num_experts_per_tok", num_chosen, 1, num_experts, integer=True, raises=ConfigError)
        shared_size = raw.get("shared_expert_intermediate_size") or 0
        check_number(f"{where}: shared_expert_intermediate_size", shared_size, 0, integer=True, raises=ConfigError)
        return cls(
            num_experts=num_experts,
            num_chosen=num_chosen,
            size=count_of(sizes, "moe_intermediate_size", where),
            normalises=bool(sizes.get("norm_topk_prob", False)),
            sparse_layers=_sparse_layers(sizes, where, num_layers),
            shared_size=shared_size,
        )

    def make_mlp(self, config: DecoderConfig, index: int) -> nn.Module:
        """What stands behind attention in the layer of an index."""
        if index not in self.sparse_layers:
            return DecoderMLP(config)
        return SparseMLP(
            config.hidden_size,
            lambda: DecoderMLP(config, self.size),
            num_experts=self.num_experts,
            num_chosen=self.num_chosen,
            normalises=self.normalises,
            shared=DecoderMLP(config, self.shared_size) if self.shared_size else None,
        )


def _sparse_layers(raw: Mapping[str, Any], where: str, num_layers: int) -> frozenset[int]:
    """Every `decoder_sparse_step`-th layer but those of `mlp_only_layers`."""
    step = count_of(raw, "decoder_sparse_step", where)
    dense = raw.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(isinstance(x, bool) or not isinstance(x, int) for x in dense):
        raise ConfigError(f"{where}: mlp_only_layers: got {brief(dense)}, expected a list of layer indices")
    return frozenset(index for index in range(num_layers) if (index + 1) % step == 0) - set(dense)
