"""What drawing must come to, from the definition of its settings."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_omni.layers.batched_draw import DrawSettings


def expected_shares(logits: Tensor, settings: DrawSettings) -> Tensor:
    """[V], all different -> [V] float64: how often each token is drawn."""
    shares = torch.zeros(len(logits), dtype=torch.float64)
    order = logits.argsort(descending=True)[: settings.top_k or len(logits)]
    if settings.temperature == 0:
        order = order[:1]
    shares[order] = (logits[order].double() / (settings.temperature or 1)).softmax(0)
    ranked = shares.sort(descending=True)
    shares[ranked.indices[ranked.values.cumsum(0) - ranked.values >= settings.top_p]] = 0
    shares[shares < settings.min_p * shares.max()] = 0
    return shares / shares.sum()
