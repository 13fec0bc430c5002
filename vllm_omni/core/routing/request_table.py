"""Where every request is: waiting, running, or ended and not yet taken; and how many there were. Decides nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from vllm_omni.core.routing.request_state import RequestEnd, RequestState
from vllm_omni.errors import OmniError, SchedulerError
from vllm_omni.request import OmniRequest, RequestStatus


class RequestTable:
    """Every request is in one place, and each has one end. counts: of ends by status, and what the scheduler adds."""

    def __init__(self) -> None:
        self.num_admitted = 0
        self.waiting: dict[str, RequestState] = {}
        self.running: dict[str, RequestState] = {}
        self.counts: Counter[str] = Counter()
        self._ends: dict[str, RequestEnd] = {}

    @property
    def is_empty(self) -> bool:
        return not (self.waiting or self.running or self._ends)

    def ensure_unused(self, request_id: str) -> None:
        """Raises SchedulerError for an id that is in use."""
        if request_id in self.waiting or request_id in self.running or request_id in self._ends:
            raise SchedulerError(f"request_id: {request_id!r} is in use by an unfinished request; ids must be unique")

    def is_unfinished(self, request_id: str) -> bool:
        return request_id in self.running or request_id in self.waiting

    def unfinished(self) -> list[RequestState]:
        return [*self.waiting.values(), *self.running.values()]

    def admit(self, state: RequestState) -> None:
        self.num_admitted += 1
        self.waiting[state.request.request_id] = state

    def start(self, request_id: str) -> None:
        """A waiting request runs from now on."""
        self.running[request_id] = self.waiting.pop(request_id)

    def working_on(self, request_id: str, stage: str) -> RequestState | None:
        """The request that a stage works on; None, and a stray event counted, where it does not."""
        state = self.running.get(request_id)
        if state is not None and stage in state.running:
            return state
        self.counts["stray_events"] += 1
        return None

    def end(self, request_id: str, status: RequestStatus, error: OmniError | None) -> None:
        """Ends a request; an unknown or ended one is left alone."""
        state = self.running.pop(request_id, None) or self.waiting.pop(request_id, None)
        if state is None:
            return
        self.counts["processed"] += 1
        self.counts[status.value] += 1
        self._ends[request_id] = state.end(status, error)

    def reject(self, request: OmniRequest, error: OmniError) -> None:
        """The end of a request that was never admitted."""
        self.ensure_unused(request.request_id)
        self.counts[RequestStatus.REJECTED.value] += 1
        self._ends[request.request_id] = RequestEnd(request, RequestStatus.REJECTED, error=error)

    def take_ends(self) -> list[RequestEnd]:
        """Every end since the last call, in order."""
        ends = list(self._ends.values())
        self._ends.clear()
        return ends

    def in_flight(self) -> Iterator[tuple[str, str]]:
        """(request id, stage) of every launched stage that is still to end."""
        for request_id, state in self.running.items():
            for stage in state.running:
                yield (request_id, stage)

    def check_integrity(self) -> None:
        """Raises SchedulerError when a request is in two places, a count is wrong or a state is broken."""
        admitted_ends = [key for key, end in self._ends.items() if end.status is not RequestStatus.REJECTED]
        places = [*self.waiting, *self.running, *admitted_ends]
        if len(places) != len(set(places)):
            raise SchedulerError(f"a request is in two places: {sorted(places)}")
        num_unfinished, num_ended = len(self.waiting) + len(self.running), self.counts["processed"]
        if self.num_admitted != num_unfinished + num_ended:
            raise SchedulerError(f"{self.num_admitted} admitted, {num_unfinished} unfinished, {num_ended} ended")
        for state in self.unfinished():
            state.check_integrity()
        if any(state.running or state.done for state in self.waiting.values()):
            raise SchedulerError("a waiting request has launched stages")
