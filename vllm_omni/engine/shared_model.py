"""The model of a stage, loaded: whole, or the first rank's share of it beside the ranks that have the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from vllm_omni.engine.base import EngineContext, StageSpec
from vllm_omni.engine.parallel import DEADLINE_SHARE
from vllm_omni.worker.parallel.group import ParallelGroup
from vllm_omni.worker.parallel.layout import Place
from vllm_omni.worker.parallel.links import Links

T = TypeVar("T")
Key = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class SharedModel(Generic[T]):
    """The first rank's part, and the group of all ranks where there are several."""

    key: Key  # of the model among those that are loaded
    model: T
    group: ParallelGroup | None = None

    @classmethod
    def load(
        cls,
        spec: StageSpec,
        context: EngineContext,
        key: Key,
        load: Callable[[Links | None], T],
        orders: Callable[[Links], Mapping[str, Any]],
    ) -> SharedModel[T]:
        """All ranks load at the same time. A group that ended is replaced; the first rank's weights stay. They are of
        one replica: layers know which ranks they meet. load: the first rank's part; None: the whole. orders: what the
        followers load.
        """
        parallel = spec.stage.parallel
        if parallel.size == 1:
            return cls(key, context.models.get(key, lambda: load(None)))
        key = (*key, f"the first of {parallel.size} ranks of {spec.stage.name}", context.replica)
        links = context.models.get((*key, "links"), lambda: Links(Place(parallel, 0), context.device))
        deadline_s, wake = DEADLINE_SHARE * spec.worker_timeout, context.background.wake
        group = ParallelGroup(parallel, context.device, deadline_s, orders(links), links, wake)
        try:
            model = context.models.get(key, lambda: load(links))
            group.connect()
        except BaseException:
            group.close()
            raise
        return cls(key, model, group)
