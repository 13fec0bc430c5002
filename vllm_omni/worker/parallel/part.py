"""The contract of what a follower runs: one implementation for each kind of model, a row of the registry each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vllm_omni.worker.parallel.links import Links


class FollowerPart(ABC):
    """This rank's share of the layers of one model."""

    @abstractmethod
    def __init__(self, orders: Mapping[str, Any], links: Links) -> None:
        """Loads it. orders: what the first rank says of the model, plain values."""

    @abstractmethod
    def step(self, plain: Any, tensors: Sequence[Tensor]) -> None:
        """Computes what one message asks for, together with all other ranks."""
