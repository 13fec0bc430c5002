"""Texts that come in pieces while their requests run: what every stage that reads one makes of each piece."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from vllm_omni.config.graph import CALLER, Edge
from vllm_omni.core.routing.omni_scheduler import OmniScheduler
from vllm_omni.core.routing.request_plan import ReadText, RequestPlan
from vllm_omni.engine.boundary import stage_boundary
from vllm_omni.errors import InvalidRequestError
from vllm_omni.executor.replica_set import ReplicaSet


class OpenText:
    """plan: of a request that is open."""

    def __init__(self, plan: RequestPlan) -> None:
        self._readers: list[tuple[Edge, ReadText]] = [
            (edge, stage.read_text)
            for stage in plan.stages.values()
            for edge in stage.edges
            if edge.source == CALLER and stage.read_text is not None
        ]
        self._is_whole = False

    def read(self, piece: str, is_last: bool) -> list[tuple[Edge, Tensor]]:
        """New rows by edge. InvalidRequestError for what cannot be read, and after the last piece."""
        if self._is_whole:
            raise InvalidRequestError("prompt: got a piece of its text after the last one, expected none")
        self._is_whole = is_last
        rows: list[tuple[Edge, Tensor]] = []
        for edge, read in self._readers:
            with stage_boundary(edge.target):
                rows.append((edge, read(piece, is_last)))
        return rows


class OpenTexts:
    """Of all unfinished requests that are open."""

    def __init__(self, scheduler: OmniScheduler, stages: Mapping[str, ReplicaSet]) -> None:
        self._scheduler, self._stages = scheduler, stages
        self._texts: dict[str, OpenText] = {}

    def __len__(self) -> int:
        return len(self._texts)

    def open(self, request_id: str, plan: RequestPlan) -> None:
        self._texts[request_id] = OpenText(plan)

    def extend(self, request_id: str, piece: str, is_last: bool, now: float) -> None:
        """Hands on what a piece adds; nothing for a request that has ended. OmniError for what cannot be read."""
        text = self._texts.get(request_id)
        for edge, rows in [] if text is None else text.read(piece, is_last):
            if self._scheduler.text_came(request_id, edge, len(rows), is_last, now):
                self._stages[edge.target].keep_rows(request_id, edge.target_port, rows)

    def close(self, request_id: str) -> None:
        """Its request has ended; fine for one that is not open."""
        self._texts.pop(request_id, None)
