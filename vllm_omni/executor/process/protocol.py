"""What parent and child say to each other besides orders and reports, which `vllm_omni.executor.orders` has."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_omni import registry
from vllm_omni.config.schema import OmniConfig
from vllm_omni.engine.base import ReadPorts
from vllm_omni.errors import StageError
from vllm_omni.executor.blueprint import StageBlueprint
from vllm_omni.executor.wire.table import WireTypes
from vllm_omni.utils.checks import brief


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The first message, to the child: how it finds the same modules as its parent."""

    sys_path: Sequence[str]
    folder: str  # where relative paths begin
    rows: Mapping[str, Mapping[str, str]]  # of the registry
    kinds: Sequence[str]  # of the stages of the config, which comes next as a StageBlueprint
    log_level: int

    @classmethod
    def of(cls, config: OmniConfig) -> Surroundings:
        """Of this process."""
        kinds = [stage.kind for stage in config.stages.values()]
        level = logging.getLogger("vllm_omni").getEffectiveLevel()
        return cls(sys.path, str(Path.cwd()), registry.TABLES, kinds, level)


@dataclass(frozen=True, slots=True)
class Loaded:
    """From the child: the stage takes orders. error: what loading raised; then the child ends."""

    error: BaseException | None = None
    num_models: int = 0  # that it has loaded
    modules: Sequence[str] = ()  # that it has imported

    def __post_init__(self) -> None:
        if not isinstance(self.error, BaseException | None) or type(self.num_models) is not int:
            raise StageError(f"got {brief([self.error, self.num_models])}, expected an error and a count")
        if not all(isinstance(name, str) for name in self.modules):
            raise StageError(f"got {brief(self.modules)}, expected names of modules")


@dataclass(frozen=True, slots=True)
class LogLine:
    """From the child, for the parent's log."""

    logger: str
    level: int
    text: str

    def __post_init__(self) -> None:
        if not (isinstance(self.logger, str) and type(self.level) is int and isinstance(self.text, str)):
            raise StageError(f"got {brief([self.logger, self.level, self.text])}, expected a line for the log")


OWN: tuple[Any, ...] = (Surroundings, StageBlueprint, ReadPorts, Loaded, LogLine)


def wire_types(kinds: Iterable[str] = ()) -> WireTypes:
    """What the two may send each other, of a config with stages of these kinds."""
    return WireTypes(kinds, OWN)
