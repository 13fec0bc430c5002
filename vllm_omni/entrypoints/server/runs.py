"""Requests that are being served: from their admission to their final output, and for a while beyond."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from vllm_omni.core.routing.request_state import RequestPosition
from vllm_omni.entrypoints.server.http.api_error import RETRY_S, ApiError, error_of
from vllm_omni.entrypoints.server.models import ServedModel
from vllm_omni.request import OmniOutput, OmniRequest, RequestStatus, StageResult

MAX_ENDED = 256  # runs that are remembered after their end
MAX_NAMED = 8  # ids in the text of an error


@dataclass(slots=True, eq=False)
class Run:
    """One request. Times are seconds on `time.monotonic`, but for `created`."""

    request: OmniRequest
    model: ServedModel
    route: str
    wants_parts: bool  # whether somebody reads partial outputs
    wants_steps: bool = False  # whether one of every step, also where it made nothing to show
    created: float = field(default_factory=time.time)  # seconds since 1970
    began_s: float = field(default_factory=time.monotonic)
    first_part_s: float | None = None  # when there was something to show
    ended_s: float | None = None
    first_kind: str = ""  # what that was: "text", "image", "audio", "video" or "preview"
    call_id: str = ""  # `x-request-id` of its call, which may have several runs, and which callers may use again
    traceparent: str | None = None  # the caller's own trace, W3C
    output: OmniOutput | None = None  # the final one

    @property
    def id(self) -> str:
        return self.request.request_id

    @property
    def is_ended(self) -> bool:
        return self.output is not None

    @property
    def position(self) -> RequestPosition:
        """Of a run that has not ended; one that is being planned waits."""
        found = self.model.omni.find(self.id) if self.model.is_loaded else None
        return found or RequestPosition(RequestStatus.WAITING)

    def note(self, output: OmniOutput) -> None:
        """Keeps what a partial or final output says of the way."""
        if self.first_part_s is None and output.results:
            self.first_part_s, self.first_kind = time.monotonic(), _kind_of(next(iter(output.results.values())))
        if output.finished:
            self.output, self.ended_s = output, time.monotonic()

    def forget_content(self) -> None:
        """Of prompt and answer only what is needed to say how it went."""
        self.request = OmniRequest(prompt="", request_id=self.id, timeout_s=self.request.timeout_s)
        if self.output is not None:
            self.output = OmniOutput(
                request_id=self.id, status=self.output.status, metrics=self.output.metrics, error=self.output.error
            )


class RunTable:
    """Every run by its id; whoever wants to know of them is an observer."""

    def __init__(self) -> None:
        self._living: dict[str, Run] = {}
        self._ended: deque[Run] = deque(maxlen=MAX_ENDED)
        self.observers: list[Callable[[Run], None]] = []  # called when a run has ended
        self.is_draining = False

    @property
    def living(self) -> Sequence[Run]:
        return list(self._living.values())

    def find(self, given: str) -> Run:
        """By its own id, by that of an answer, which has a word before it (`chatcmpl-`), or by `x-request-id`: the one
        that lives, else the last that ended. ApiError 404 for none, 409 where several live.
        """
        known = [*self._living.values(), *reversed(self._ended)]
        ids = (given, given.partition("-")[2])
        found = [run for run in known if run.id in ids] or [run for run in known if run.call_id == given]
        if not found:
            raise ApiError(404, f"request {given!r:.80} is unknown, or ended long ago", code="request_not_found")
        living = [run.id for run in found if run.id in self._living]
        if len(living) > 1:
            names = ", ".join(living[:MAX_NAMED])
            words = f"request_id: got {given!r:.80}, which {len(living)} requests have; name one of them: {names}"
            raise ApiError(409, words, code="ambiguous_id", param="request_id")
        return found[0]

    async def final(self, run: Run) -> OmniOutput:
        """The final output; ApiError where it has an error."""
        async with aclosing(self.parts(run)) as parts:
            async for output in parts:
                if output.finished:
                    return output
        raise AssertionError("a run ends with its final output")

    async def parts(self, run: Run) -> AsyncGenerator[OmniOutput, None]:
        """Partial outputs, where the run wants them, and the final one; ApiError where that has an error. Closing it
        early aborts the run.
        """
        self._begin(run)
        try:
            async with aclosing(_outputs(run)) as outputs:
                async for output in outputs:
                    run.note(output)
                    error = error_of(output)
                    if error is not None:
                        raise error
                    yield output
        finally:
            self._end(run)

    def _begin(self, run: Run) -> None:
        if self.is_draining:
            raise ApiError(503, "the server is shutting down", code="draining", retry_s=RETRY_S)
        if run.id in self._living:
            raise ApiError(409, f"request_id: {run.id!r:.80} is running already", code="duplicate_id")
        self._living[run.id] = run

    def _end(self, run: Run) -> None:
        self._ended.append(self._living.pop(run.id))
        run.ended_s = run.ended_s or time.monotonic()
        try:
            for observe in self.observers:
                observe(run)
        finally:
            run.forget_content()


async def _outputs(run: Run) -> AsyncGenerator[OmniOutput, None]:
    omni = run.model.omni
    if not run.wants_parts:
        yield await omni.generate(run.request)
        return
    async with aclosing(omni.stream(run.request, steps=run.wants_steps)) as outputs:
        async for output in outputs:
            yield output


def describe(run: Run) -> Mapping[str, Any]:
    """As in `/v1/requests/{id}`."""
    now = run.ended_s or time.monotonic()
    about = {
        "id": run.id,
        "x_request_id": run.call_id,
        "object": "request",
        "model": run.model.name,
        "route": run.route,
        "created": int(run.created),
        "elapsed_s": round(now - run.began_s, 4),
    }
    if run.output is not None:
        return {**about, **_end(run.output)}
    if run.ended_s is not None:  # its client has gone
        return {**about, "status": RequestStatus.ABORTED.value, "metrics": {}, "error": None}
    return {**about, **_way(run)}


def _way(run: Run) -> Mapping[str, Any]:
    """Of a run that has not ended."""
    position = run.position
    stages: dict[str, dict[str, Any]] = {stage: {"status": "done"} for stage in position.done}
    stages |= {stage: {"status": "running"} for stage in position.running}
    for stage, at in position.progress.items():
        steps = {"step": at.step, "num_steps": at.num_steps}
        stages[stage] = {
            "status": "running",
            **stages.get(stage, {}),
            **steps,
            "progress": at.step / max(1, at.num_steps),
        }
    return {"status": position.status.value, "num_ahead": position.num_ahead, "stages": stages}


def _end(output: OmniOutput) -> Mapping[str, Any]:
    error = error_of(output)
    metrics = {stage: dict(values) for stage, values in output.metrics.items()}
    return {
        "status": output.status.value,
        "metrics": metrics,
        "error": None if error is None else error.body["error"],
    }


def _kind_of(result: StageResult) -> str:
    if result.previews:
        return "preview"
    made = {"image": result.images, "audio": result.audios, "video": result.videos}
    return next((kind for kind, items in made.items() if items), "text")
