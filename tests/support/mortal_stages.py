"""Stages of language models and diffusion models as they are, whose process can be told by a signal that something goes
wrong: kinds `mortal_ar` and `mortal_dit`; and `mortal_painter`, a toy that paints a plain picture.

SIGUSR1: the next step (or the loading that is under way) raises. SIGUSR2: it ends the process by SystemExit.
"""

from __future__ import annotations

import dataclasses
import signal
from types import FrameType
from typing import Any

from support.toy_engine import PictureSpecimen

from vllm_omni import registry
from vllm_omni.config.schema import OmniConfig, StageConfig
from vllm_omni.engine.ar.spec import ARSpec
from vllm_omni.engine.base import EngineContext, StageEngine, StageSpec
from vllm_omni.engine.diffusion.spec import DiffusionSpec
from vllm_omni.executor.homes import runs_apart
from vllm_omni.payload import TensorSpec
from vllm_omni.utils.files import ModelFolders

DOOMS: dict[int, BaseException] = {
    signal.SIGUSR1: RuntimeError("something went wrong"),
    signal.SIGUSR2: SystemExit("leaving"),
}


class MortalAR(ARSpec):
    @classmethod
    def describe(cls, stage: StageConfig, config: OmniConfig, folders: ModelFolders) -> ARSpec:
        return _mortal(super().describe(stage, config, folders))


class MortalDiT(DiffusionSpec):
    @classmethod
    def describe(cls, stage: StageConfig, config: OmniConfig, folders: ModelFolders) -> StageSpec:
        return _mortal(super().describe(stage, config, folders))


class MortalPainter(PictureSpecimen):
    """Reads states of any width."""

    @classmethod
    def describe(cls, stage: StageConfig, config: OmniConfig, folders: ModelFolders) -> StageSpec:
        return _mortal(super().describe(stage, config, folders))

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.signature = dataclasses.replace(self.signature, inputs={"states": TensorSpec(("T", "D"))})


def register_mortals() -> None:
    registry.register("stage kind", "mortal_ar", f"{__name__}:MortalAR")
    registry.register("stage kind", "mortal_dit", f"{__name__}:MortalDiT")
    registry.register("stage kind", "mortal_painter", f"{__name__}:MortalPainter")


def _mortal(spec: Any) -> Any:
    load = spec.load

    def loaded(context: EngineContext) -> StageEngine:
        doom = _Doom()
        engine: Any = load(context)
        doom.strike()
        step = engine.step

        def stepped() -> Any:
            doom.strike()
            events = step()
            doom.strike()  # what was made is lost
            return events

        engine.step = stepped
        return engine  # type: ignore[no-any-return]

    if runs_apart(spec.stage):
        spec.load = loaded
    return spec


class _Doom:
    """What a signal has announced, until it strikes."""

    def __init__(self) -> None:
        self._error: BaseException | None = None
        for number in DOOMS:
            signal.signal(number, self._announce)

    def strike(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _announce(self, number: int, frame: FrameType | None) -> None:
        self._error = DOOMS[number]
