"""Evens out the text states for training, and folds that into the text embedder afterwards.

What tells "dark" from "light" in a state of layer -2 is a twentieth of the state's size: the rest is what the language
model makes of the position. Gradient descent finds such small directions last, so the embedder is trained on whitened
states (its function stays linear, only the steps change) and published as one matrix that takes plain ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 0.01


@dataclass(frozen=True)
class Whitening:
    """z = matrix @ (state / rms(state) - mean). mean: [D]; matrix: [D, D] symmetric."""

    mean: Tensor
    matrix: Tensor
    eps: float

    @classmethod
    def of(cls, states: Tensor, eps: float) -> Whitening:
        """From states [n, D]; directions with a variance below FLOOR are not blown up."""
        normed = unit_rms(states, eps)
        values, vectors = torch.linalg.eigh(torch.cov(normed.T.double()))
        matrix = vectors @ torch.diag((values.clamp(min=0) + FLOOR).rsqrt()) @ vectors.T
        return cls(normed.mean(0), matrix.float(), eps)

    def __call__(self, states: Tensor) -> Tensor:
        return (unit_rms(states, self.eps) - self.mean) @ self.matrix

    def fold(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Weight [D', D] and bias [D'] for whitened states -> the same function of states at unit rms."""
        folded = weight @ self.matrix
        return folded, bias - folded @ self.mean


def unit_rms(states: Tensor, eps: float) -> Tensor:
    return states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + eps)
