"""What an actor says besides what a process of a stage does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vllm_omni.errors import DataLostError, StageError
from vllm_omni.executor.process.protocol import OWN
from vllm_omni.executor.wire.table import WireTypes
from vllm_omni.utils.checks import brief


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """The first message of an actor."""

    host: str  # the address of its machine
    node: str  # the id of its node, as `ray list nodes` says it
    pid: int

    def __post_init__(self) -> None:
        if not (isinstance(self.host, str) and isinstance(self.node, str) and type(self.pid) is int):
            raise StageError(f"got {brief([self.host, self.node, self.pid])}, expected the place of a process")


def lost(error: Exception) -> DataLostError:
    """What is said where Ray cannot fetch an object any more."""
    words = " ".join(str(error).split())
    return DataLostError(f"what another stage had made for it is gone ({type(error).__name__}: {words:.200})")


def actor_types(kinds: Iterable[str] = ()) -> WireTypes:
    """What the loop and an actor may send each other, of a config with stages of these kinds."""
    return WireTypes(kinds, (*OWN, Whereabouts))
