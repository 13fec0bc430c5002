"""What is on its way to callers: the partial outputs of requests that stream, and the final output of every one.

Knows what a stage gave, not where it runs nor when a request ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from vllm_omni.core.routing.request_state import RequestEnd
from vllm_omni.engine.boundary import stage_boundary
from vllm_omni.engine.output import PartialOutputs, make_output, unfinished_result
from vllm_omni.errors import SchedulerError
from vllm_omni.messages import StageDone, StageProgress, StageRows
from vllm_omni.payload import StagePayload
from vllm_omni.request import OmniOutput, Progress, StageResult

Made = Callable[[str, str], StagePayload | None]  # stage and request id -> what the stage has made of it so far


class Outbox:
    """Of one loop. A request that streams is watched from `watch` until its end."""

    def __init__(self) -> None:
        self._outputs: list[OmniOutput] = []
        self._partials: dict[str, PartialOutputs] = {}
        self._shown: set[str] = set()  # watched requests of which a caller has something

    def __len__(self) -> int:
        return len(self._outputs)

    def watch(self, request_id: str, outputs: Sequence[str], steps: bool) -> None:
        """Partial outputs come before the final one. outputs, steps: as of PartialOutputs."""
        self._partials[request_id] = PartialOutputs(outputs, steps)

    def is_watched(self, request_id: str) -> bool:
        return request_id in self._partials

    def progress(self, request_id: str) -> Mapping[str, Progress]:
        """How far the stages of a watched request are; from any thread."""
        partials = self._partials.get(request_id)
        return {} if partials is None else partials.progress

    def add_partial(self, stage: str, event: StageProgress | StageRows | StageDone) -> None:
        """What is new, where the request is watched; an OmniError for what cannot be shown."""
        partials = self._partials.get(event.request_id)
        if partials is None:
            return
        with stage_boundary(stage):
            if isinstance(event, StageDone):
                output = partials.finished(event.payload, stage)
            else:
                output = partials.make(event, stage)
        if output is not None:
            self._outputs.append(output)
            if output.results:
                self._shown.add(event.request_id)

    def has_shown(self, request_id: str) -> bool:
        """Whether a caller has more of an unfinished request than how far it is."""
        return request_id in self._shown

    def end(self, end: RequestEnd, made: Made) -> None:
        """The final output of a request, with what stages had made for its caller that were at work; it is watched no
        longer.
        """
        unfinished = self._unfinished(end, made)
        self._partials.pop(end.request.request_id, None)
        self._shown.discard(end.request.request_id)
        self._outputs.append(make_output(end, unfinished))

    def take(self) -> list[OmniOutput]:
        """All that have come since the last time, in order."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def check_integrity(self, is_unfinished: Callable[[str], bool]) -> None:
        """SchedulerError where a request is watched that has ended."""
        ended = sorted(request_id for request_id in self._partials if not is_unfinished(request_id))
        if ended:
            raise SchedulerError(f"partial outputs are expected of {ended}, which have ended")

    def _unfinished(self, end: RequestEnd, made: Made) -> dict[str, StageResult]:
        request_id = end.request.request_id
        found: dict[str, StageResult] = {}
        for stage in {*end.made, *end.abandoned}.intersection(end.outputs):
            payload = end.made[stage] if stage in end.made else made(stage, request_id)
            result = unfinished_result(stage, payload, self._partials.get(request_id))
            if result is not None:
                found[stage] = result
        return found
