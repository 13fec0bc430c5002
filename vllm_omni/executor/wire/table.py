"""The closed table of dataclasses and enums that may cross between processes, by name."""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Iterable, Iterator
from typing import Any, get_args, get_type_hints

from vllm_omni import lora, messages, params, payload, registry, request
from vllm_omni.config import schema
from vllm_omni.executor import orders
from vllm_omni.executor.wire.base import WireError
from vllm_omni.media.audio import Audio
from vllm_omni.utils.checks import brief

SHARED: tuple[type, ...] = (
    messages.StageTask,
    messages.StageProgress,
    messages.StageWorked,
    messages.StageRows,
    messages.ChunkConsumed,
    messages.StageDone,
    messages.StageFailed,
    orders.Submit,
    orders.FeedChunk,
    orders.Hold,
    orders.Release,
    orders.Drop,
    orders.Ask,
    orders.Answer,
    orders.Report,
    payload.RowRange,
    payload.StreamChunk,
    payload.StagePayload,
    payload.SavedStage,
    request.OmniRequest,
    params.StageParams,
    params.SamplingParams,
    params.DiffusionParams,
    lora.LoRA,
    Audio,
    schema.OmniConfig,
    schema.StageConfig,
    schema.SchedulerConfig,
    schema.SchedulerType,
    schema.DiTCacheConfig,
    schema.LimitsConfig,
    schema.PromptsConfig,
    schema.LoRAConfig,
    schema.ParallelConfig,
    schema.RayConfig,
    schema.RayStageConfig,
    schema.EdgeConfig,
    schema.StreamConfig,
)


class WireTypes:
    """The shared types, and what some stage kinds add, those of the pipeline whose messages are read: options,
    parameters, prepared inputs. Kinds are looked at when a name is met that is none of the shared ones.
    """

    def __init__(self, kinds: Iterable[str] = (), more: Iterable[type] = ()) -> None:
        self._kinds = tuple(dict.fromkeys(kinds))
        self._more = tuple(more)

    def name(self, kind: type) -> str:
        """What stands for a class in a message; WireError for one that is not in the table."""
        found = self._names.get(kind)
        if found is None:
            raise WireError(f"got a {kind.__module__}.{kind.__qualname__}, which cannot be sent to another process")
        return found

    def find(self, name: object) -> type:
        """The class of that name; WireError where the table has none."""
        found = self._types.get(name) if isinstance(name, str) else None
        if found is None:
            raise WireError(f"got a message of the type {brief(name)}, which is none of the known ones")
        return found

    @functools.cached_property
    def _types(self) -> dict[str, type]:
        found: dict[str, type] = {kind.__name__: kind for kind in (*SHARED, *self._more)}
        for kind in self._kinds:
            spec: Any = registry.resolve("stage kind", kind)
            for each in (*_reachable(spec.options_type), spec.params_type, *spec.portable_types):
                if each not in found.values():
                    found[f"{each.__module__}:{each.__qualname__}"] = each
        return found

    @functools.cached_property
    def _names(self) -> dict[type, str]:
        return {kind: name for name, kind in self._types.items()}


def _reachable(kind: Any, seen: frozenset[Any] = frozenset()) -> Iterator[type]:
    """A dataclass or enum, and those that its fields may hold."""
    if kind in seen:
        return
    if dataclasses.is_dataclass(kind):
        yield kind  # type: ignore[misc]
        for hint in get_type_hints(kind).values():
            yield from _reachable(hint, seen | {kind})
    elif isinstance(kind, type) and issubclass(kind, enum.Enum):
        yield kind
    for inner in get_args(kind):
        if not isinstance(inner, str | int | float | bytes | None):
            yield from _reachable(inner, seen)
