"""What the training scripts share: one step of training, schedule, averaged weights, resumable checkpoints, a log that
a person can read.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from tools.tiny.common.muon import Optimizers
from vllm_omni.utils.device import multiplies_bfloat16

LOG_EVERY = 50  # steps


def mixed_precision(device: torch.device | None = None) -> torch.autocast:
    """A context: bfloat16 products where the device (None: the CPU) multiplies it. Elsewhere, as on a CPU that has to
    emulate it, float32 is several times as fast.
    """
    device = device or torch.device("cpu")
    return torch.autocast(device.type, torch.bfloat16, enabled=multiplies_bfloat16(device))


def learning_rate_factor(step: int, num_steps: int, warmup: int = 100) -> float:
    """Linear warm-up, then a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


class AveragedWeights:
    """Exponential moving average of a module's parameters, with a ramp so that early steps are forgotten quickly."""

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        self.decay = decay
        self.weights = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        averaged, current = list(self.weights.values()), [p.detach() for p in module.parameters()]
        torch._foreach_lerp_(averaged, current, 1 - decay)


class Run:
    """One training run in a folder: its checkpoint, its log and its wall time."""

    def __init__(self, folder: Path, num_steps: int, save_every_s: float = 60.0) -> None:
        self.folder = folder
        self.num_steps = num_steps
        self.save_every_s = save_every_s
        self.step = 0
        self.seconds = 0.0
        self._started = self._saved = time.perf_counter()
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def resume(self) -> dict[str, object] | None:
        """The saved state, or None for a fresh start."""
        if not self.checkpoint.exists():
            return None
        state = torch.load(self.checkpoint, weights_only=True)
        self.step, self.seconds = state.pop("step"), state.pop("seconds")
        return state

    def elapsed_s(self) -> float:
        return self.seconds + time.perf_counter() - self._started

    def should_save(self) -> bool:
        return self.step == self.num_steps or time.perf_counter() - self._saved > self.save_every_s

    def save(self, **state: object) -> None:
        self._saved = time.perf_counter()
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save({**state, "step": self.step, "seconds": self.elapsed_s()}, temporary)
        temporary.replace(self.checkpoint)

    def log(self, **values: float) -> None:
        line = {"step": self.step, "seconds": round(self.elapsed_s(), 1), **{k: round(v, 5) for k, v in values.items()}}
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(" ".join(f"{k}={v}" for k, v in line.items()), flush=True)


class Trainer:
    """A module in training: `while trainer.begin(): ...; loss.backward(); trainer.step()`.

    Goes on where the folder's checkpoint ends. constants: modules that are not trained, but belong to the result.
    """

    def __init__(
        self,
        folder: Path,
        num_steps: int,
        module: nn.Module,
        optimizer: Optimizers,
        *,
        decay: float = 0.999,
        constants: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.run = Run(folder, num_steps)
        self.module, self.optimizer = module, optimizer
        self.average = AveragedWeights(module, decay)
        self._constants = constants or {}
        self._recent: dict[str, list[float]] = {}
        if state := self.run.resume():
            module.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            self.average.weights = state["average"]
            for name, constant in self._constants.items():
                constant.load_state_dict(state[name])

    def begin(self) -> bool:
        """Prepares the next step; False when all are done."""
        if self.run.step >= self.run.num_steps:
            return False
        self.optimizer.scale_learning_rate(learning_rate_factor(self.run.step, self.run.num_steps))
        self.optimizer.zero_grad()
        return True

    def step(self, **losses: Tensor | float) -> None:
        """Takes the step along the gradients. losses: for the log, which gives their means since its last line."""
        trained = [parameter for parameter in self.module.parameters() if parameter.grad is not None]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        self.optimizer.step()
        self.run.step += 1
        self.average.update(self.module, self.run.step)
        for name, value in losses.items():
            self._recent.setdefault(name, []).append(float(value))
        if self.is_at(LOG_EVERY):
            self.run.log(**{name: sum(values) / len(values) for name, values in self._recent.items()})
            self._recent = {}
        if self.run.should_save():
            self.run.save(
                model=self.module.state_dict(),
                optimizer=self.optimizer.state_dict(),
                average=self.average.weights,
                **{name: constant.state_dict() for name, constant in self._constants.items()},
            )

    def is_at(self, every: int) -> bool:
        """Whether another so many steps are done."""
        return self.run.step % every == 0

    def finish(self) -> None:
        """The module takes its averaged weights."""
        self.module.load_state_dict(self.average.weights, strict=False)
