"""A sparse mixture of experts (Switch Transformers, arXiv 2101.03961) in the place of an MLP: each token is computed by
the few experts that its router chooses, and perhaps by one that all share. Knows no model.

Tokens are sorted by expert, and each expert that has any computes them in one product (on CPUs all experts in one call
of the kernels); nothing is computed for the others. A row's result depends on that row alone, as far as that of a
`Linear` does: its experts' parts are added in the order of the experts, whoever else they compute.

Legend: N tokens of a step, D hidden size, E experts, k of them for each token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vllm_omni.layers.decoder import DecoderMLP
from vllm_omni.layers.linear import Linear
from vllm_omni.layers.native.experts import NativeExperts
from vllm_omni.layers.shard import WHOLE, Shard


class SparseMLP(nn.Module):
    """E experts behind a router. Parameters are named as transformers publishes them: `gate`, `experts.0`, ...,
    `shared_expert`, `shared_expert_gate`.
    """

    def __init__(
        self,
        hidden_size: int,
        make_expert: Callable[[], nn.Module],
        *,
        num_experts: int,
        num_chosen: int,
        normalises: bool,
        shared: nn.Module | None = None,
        shard: Shard = WHOLE,
    ) -> None:
        """num_chosen: k. normalises: whether the weights of the chosen ones are scaled to sum to one. shared: an expert
        for every token, whose part a gate of its own weighs. shard: of which every expert has its share, and sums
        nothing itself: all that the chosen ones give a token is summed at once.
        """
        super().__init__()
        self.num_chosen = num_chosen
        self.normalises = normalises
        self.shard = shard
        self.gate = Linear(hidden_size, num_experts, bias=False)
        self.experts = nn.ModuleList(make_expert() for _ in range(num_experts))
        self.shared_expert = shared
        self.shared_expert_gate = None if shared is None else Linear(hidden_size, 1, bias=False)
        self._native: NativeExperts | None = None

    def forward(self, states: Tensor) -> Tensor:
        """states: [N, D] -> [N, D]."""
        weights, chosen = self.route(states)
        native = self.native()
        mixed = self._mix(states, chosen, weights) if native is None else native.mix(states, chosen, weights)
        mixed = self.shard.sum(mixed)
        if self.shared_expert is None or self.shared_expert_gate is None:
            return mixed
        return mixed + self.shared_expert_gate(states).sigmoid() * self.shared_expert(states)

    def native(self) -> NativeExperts | None:
        """What runs the experts in one call, where their weights are packed for that."""
        if self._native is None:
            pairs = [(x.gate_up_proj, x.down_proj) for x in self.experts if type(x) is DecoderMLP]
            self._native = NativeExperts.find(pairs) if len(pairs) == len(self.experts) else None
        return self._native

    def _mix(self, states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """states: [N, D] -> the sum [N, D] of what the chosen experts make of each."""
        by_expert = chosen.flatten().argsort(stable=True)  # [N k] places in `chosen`
        rows = states[by_expert // self.num_chosen]
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        parts = torch.empty_like(rows)
        start = 0
        for expert, count in zip(self.experts, counts, strict=True):
            if count:
                parts[start : start + count] = expert(rows[start : start + count])
                start += count
        placed = torch.empty_like(parts).index_copy_(0, by_expert, parts)
        placed = placed.view(*chosen.shape, states.shape[1])  # [N, k, D]
        total = placed[:, 0] * weights[:, :1]
        for index in range(1, self.num_chosen):
            total = total + placed[:, index] * weights[:, index : index + 1]
        return total

    def route(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """states: [N, D] -> the weights [N, k], the model's dtype, and the experts [N, k] int64, ascending in a row."""
        probabilities = self.gate(states).float().softmax(dim=-1)
        weights, chosen = probabilities.topk(self.num_chosen, dim=-1)
        if self.normalises:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        chosen, order = chosen.sort(dim=-1)
        return weights.gather(1, order).to(states.dtype), chosen
