"""What is loaded, from where, and in which form: said before each stage, for logs and progress bars."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from vllm_omni.core.routing.budgets import format_bytes
from vllm_omni.engine.base import EngineContext, StageSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadingStep:
    """One stage that is about to load."""

    stage: str
    kind: str
    model: str | None  # its folder, hub id or asset, as the config names it
    dtype: str
    device: str
    weights_bytes: int  # 0 where another stage has loaded them, or there are none
    dtype_reason: str  # why this one, in a few words
    note: str = ""  # what the stage says of itself: that a pipeline is hosted, where its defaults come from

    @classmethod
    def of(cls, spec: StageSpec, context: EngineContext, weights_bytes: int) -> LoadingStep:
        stage, device, precision = spec.stage, str(context.device), spec.precision
        place = (stage.name, stage.kind, stage.model, precision.name, device)
        return cls(*place, weights_bytes, precision.reason, spec.note())

    def __str__(self) -> str:
        source = f" from {self.model}" if self.model else ""
        size = f", {format_bytes(self.weights_bytes)}" if self.weights_bytes else ""
        return f"{self.stage}: {self.kind}{source} ({self.dtype} on {self.device}{size})"


OnLoading = Callable[[LoadingStep], None]


def announce(step: LoadingStep, on_loading: OnLoading | None) -> None:
    """To the log, and to whoever shows it."""
    note = f"; {step.note}" if step.note else ""
    logger.info("loading %s; dtype %s (%s)%s", step, step.dtype, step.dtype_reason, note)
    if on_loading is not None:
        on_loading(step)
