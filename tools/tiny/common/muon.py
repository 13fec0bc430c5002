"""Muon for the weight matrices (convolutions flattened), AdamW for everything else, in one optimizer.

Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/): the momentum of a matrix is replaced by the nearest
semi-orthogonal matrix, found with five Newton-Schulz iterations, so that every direction learns at the same speed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from vllm_omni.utils.device import multiplies_bfloat16

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrix: Tensor, iterations: int = 5) -> Tensor:
    """[m, n] -> roughly the nearest semi-orthogonal [m, n]. Only the direction matters: bfloat16 where it is faster."""
    a, b, c = NEWTON_SCHULZ
    tall = matrix.size(0) > matrix.size(1)
    x = (matrix.T if tall else matrix).to(torch.bfloat16 if multiplies_bfloat16(matrix.device) else torch.float32)
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; updates have the root mean square of AdamW's (factor 0.2 of Moonlight)."""

    def __init__(
        self, params: Iterable[dict[str, object]], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: dict[str, float]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
        direction = parameter.grad.lerp(momentum, group["momentum"]).flatten(1)
        update = orthogonalise(direction).to(parameter.dtype) * 0.2 * max(direction.shape) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update.view_as(parameter), alpha=-group["lr"])


class Optimizers:
    """Muon over the weight matrices whose names start with one of `matrices` (empty: all of them), AdamW over the
    rest. rates: prefixes of names -> the factor of the learning rate that holds for them.
    """

    def __init__(
        self,
        module: nn.Module,
        lr: float,
        weight_decay: float,
        matrices: Iterable[str] = (),
        rates: Mapping[str, float] | None = None,
    ) -> None:
        prefixes = tuple(matrices) or ("",)
        inner: dict[float, list[nn.Parameter]] = {}
        rest: dict[float, list[nn.Parameter]] = {}
        for name, parameter in module.named_parameters():
            rate = next((rate for prefix, rate in (rates or {}).items() if name.startswith(prefix)), 1.0)
            chosen = inner if parameter.ndim >= 2 and name.startswith(prefixes) else rest
            chosen.setdefault(rate, []).append(parameter)
        self.lr = lr
        self.parts = [
            Muon(_groups(inner), lr, weight_decay=weight_decay),
            torch.optim.AdamW(_groups(rest), lr, betas=(0.9, 0.99), weight_decay=0.0),
        ]

    def scale_learning_rate(self, factor: float) -> None:
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.lr * group["rate"] * factor

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> list[dict[str, object]]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, object]]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def _groups(parameters: Mapping[float, list[nn.Parameter]]) -> list[dict[str, object]]:
    return [{"params": members, "rate": rate} for rate, members in parameters.items()]
