"""The text of one request that comes in pieces while it runs: what every stage that reads it makes of each."""

from __future__ import annotations

from torch import Tensor

from vllm_omni.config.graph import CALLER, Edge
from vllm_omni.core.routing.request_plan import ReadText, RequestPlan
from vllm_omni.engine.boundary import stage_boundary
from vllm_omni.errors import InvalidRequestError


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
