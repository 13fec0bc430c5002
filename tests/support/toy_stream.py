"""Two small real stage kinds that stream: "toy_writer" makes rows, "toy_voice" makes ten times the rows that it reads.

They misbehave on demand, by request, in every way that a stream allows. `register_streams` adds their rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vllm_omni import registry
from vllm_omni.config.loader import load_config
from vllm_omni.config.schema import OmniConfig
from vllm_omni.engine.base import Activity, EngineContext, StageEngine, StageSpec
from vllm_omni.errors import StageError
from vllm_omni.messages import (
    ChunkConsumed,
    StageDone,
    StageEvent,
    StageFailed,
    StageProgress,
    StageRows,
    StageTask,
)
from vllm_omni.params import StageParams
from vllm_omni.payload import StagePayload, StageSignature, StreamChunk, TensorSpec

WIDTH = 2
ROWS = TensorSpec(("T", WIDTH))


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamParams(StageParams):
    """rows (6) that a writer makes, per_step (1) at a time. every (1): steps that a reader takes over a chunk. do: how
    the task misbehaves, see the engines.
    """

    rows: int | None = None
    per_step: int | None = None
    every: int | None = None
    do: str | None = None


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """name: what `cache_key` calls the stage; None: it is never cached."""

    name: str | None = None


@dataclass(slots=True)
class Work:
    task: StageTask
    made: list[Tensor] = field(default_factory=list)
    chunks: deque[StreamChunk] = field(default_factory=deque)
    step: int = 0
    is_paused: bool = False

    @property
    def num_made(self) -> int:
        return sum(map(len, self.made))


class StreamSpec(StageSpec):
    """What the specs of writer and voice share."""

    options_type = StreamOptions
    params_type: type[Any] = StreamParams
    engine_type: type[StreamEngine]

    def load(self, context: EngineContext) -> StageEngine:
        return self.engine_type(self, context)

    def cache_key(self, task: StageTask) -> str | None:
        return self.stage.options.name


class StreamEngine(StageEngine):
    """What writer and voice share. chunks: all that was ever given, by request. events: all that was ever told."""

    def __init__(self, spec: StageSpec, context: EngineContext) -> None:
        self.stage = spec.stage
        self.context = context
        self.work: dict[str, Work] = {}
        self.chunks: dict[str, list[StreamChunk]] = {}
        self.log: list[tuple[str, str]] = []

    def submit(self, task: StageTask) -> None:
        self.work[task.request_id] = Work(task)
        self.log.append(("submit", task.request_id))

    def pause(self, request_id: str) -> None:
        self.work[request_id].is_paused = True
        self.log.append(("pause", request_id))

    def resume(self, request_id: str) -> None:
        self.work[request_id].is_paused = False
        self.log.append(("resume", request_id))

    def step(self) -> list[StageEvent]:
        events: list[StageEvent] = []
        for work in [work for work in self.work.values() if self.can_go_on(work)]:
            work.step += 1
            events += self.advance(work.task.request_id, work, work.task.params)
        return events

    def abort(self, request_id: str) -> None:
        self.work.pop(request_id, None)

    def activity(self) -> Activity:
        return Activity.BUSY if any(self.can_go_on(work) for work in self.work.values()) else Activity.IDLE

    def can_go_on(self, work: Work) -> bool:
        raise NotImplementedError

    def advance(self, request_id: str, work: Work, params: Any) -> list[StageEvent]:
        raise NotImplementedError

    def finish(self, request_id: str, port: str) -> StageDone:
        made = self.work.pop(request_id).made
        nothing = torch.zeros(0, WIDTH, dtype=torch.int64)
        whole = {port: torch.cat([nothing, *made])} if port in self.context.reads.whole else {}
        return StageDone(StagePayload(request_id, self.stage.name, whole), {"steps": 1})

    def fail(self, request_id: str) -> list[StageEvent]:
        del self.work[request_id]
        return [StageFailed(request_id, StageError("it had to fail"))]


class Writer(StreamEngine):
    """Row i is [i, i]; done in a step of its own. do: fail (after three rows), after_last, wrong_port, misshapen, idle
    (busy, but no rows after two), deaf (to pauses), whole (no rows, all in the payload), empty (a last without rows),
    ends (says which row is the last).
    """

    def can_go_on(self, work: Work) -> bool:
        return not work.is_paused or work.task.params.do == "deaf"  # type: ignore[attr-defined]

    def advance(self, request_id: str, work: Work, params: Any) -> list[StageEvent]:
        num_rows = 6 if params.rows is None else params.rows
        misdeed = self._misbehave(request_id, work, params.do)
        if misdeed is not None:
            return misdeed
        start = work.num_made
        if start == num_rows:
            return [self._done(request_id, params.do)]
        stop = min(num_rows, start + (params.per_step or 1))
        work.made.append(torch.arange(start, stop)[:, None].expand(-1, WIDTH).contiguous())
        events: list[StageEvent] = [StageProgress(request_id, stop, num_rows)]
        if "codes" in self.context.reads.streamed and params.do != "whole":
            events.append(StageRows(request_id, "codes", work.made[-1], params.do == "ends" and stop == num_rows))
        return events

    def _misbehave(self, request_id: str, work: Work, do: str | None) -> list[StageEvent] | None:
        row = torch.zeros(1, WIDTH, dtype=torch.int64)
        if do == "fail" and work.num_made == 3:
            return self.fail(request_id)
        if do == "after_last" and work.step > 1:
            return [StageRows(request_id, "codes", row, is_last=True)]
        if do == "wrong_port":
            return [StageRows(request_id, "summary", row)]
        if do == "misshapen" and work.step > 1:
            return [StageRows(request_id, "codes", torch.zeros(1, WIDTH + 1, dtype=torch.int64))]
        if do == "idle" and work.num_made == 2:
            return [StageProgress(request_id, 2, 6)]
        if do == "empty":
            last = StageRows(request_id, "codes", row[:0], is_last=True)
            return [last] if work.step == 1 else [self.finish(request_id, "codes")]
        return None

    def _done(self, request_id: str, do: str | None) -> StageDone:
        made = self.work[request_id].made
        done = self.finish(request_id, "codes")
        if do != "whole":
            return done
        whole = torch.cat([torch.zeros(0, WIDTH, dtype=torch.int64), *made])
        return StageDone(StagePayload(request_id, self.stage.name, {"codes": whole}), done.metrics)


class Voice(StreamEngine):
    """Takes a chunk every `every` steps. do: never_takes, takes_twice, takes_other, raise_feed, leave (done after two
    chunks), fail (after one chunk), raise_pause, lose (done with the last chunk and yet silent).
    """

    def submit(self, task: StageTask) -> None:
        super().submit(task)
        self._give(task.request_id, task.inputs["codes"])

    def feed(self, request_id: str, port: str, chunk: StreamChunk) -> None:
        assert port == "codes"
        if self.work[request_id].task.params.do == "raise_feed":  # type: ignore[attr-defined]
            raise RuntimeError("no more, please")
        self._give(request_id, chunk)

    def pause(self, request_id: str) -> None:
        if self.work[request_id].task.params.do == "raise_pause":  # type: ignore[attr-defined]
            raise RuntimeError("no rest")
        super().pause(request_id)

    def can_go_on(self, work: Work) -> bool:
        return bool(work.chunks) and not work.is_paused and work.task.params.do != "never_takes"  # type: ignore[attr-defined]

    def advance(self, request_id: str, work: Work, params: Any) -> list[StageEvent]:
        if work.step % (params.every or 1):
            return [StageProgress(request_id, work.step, 0)]
        chunk = work.chunks.popleft()
        consumed = ChunkConsumed(request_id, "summary" if params.do == "takes_other" else "codes")
        events: list[StageEvent] = [consumed] * (9 if params.do == "takes_twice" else 1)
        if len(chunk.new_rows):
            work.made.append(chunk.new_rows * 10)
            events.append(StageRows(request_id, "sound", work.made[-1]))
        if params.do == "fail":
            return [*events, *self.fail(request_id)]
        if params.do == "lose" and chunk.is_last:
            return events
        is_over = chunk.is_last or (params.do == "leave" and len(work.made) == 2)
        return [*events, self.finish(request_id, "sound")] if is_over else events

    def _give(self, request_id: str, chunk: StreamChunk) -> None:
        assert isinstance(chunk, StreamChunk)
        self.work[request_id].chunks.append(chunk)
        self.chunks.setdefault(request_id, []).append(chunk)


class WriterSpec(StreamSpec):
    """Of a Writer."""

    engine_type = Writer
    signature = StageSignature(
        outputs={"codes": ROWS, "summary": ROWS},
        results=frozenset({"codes"}),
        streamed_outputs=frozenset({"codes"}),
    )


class VoiceSpec(StreamSpec):
    """Of a Voice."""

    engine_type = Voice
    signature = StageSignature(
        inputs={"codes": ROWS, "summary": ROWS},
        outputs={"sound": ROWS},
        required_inputs=frozenset({"codes"}),
        results=frozenset({"sound"}),
        streamed_inputs=frozenset({"codes"}),
        streamed_outputs=frozenset({"sound"}),
    )


def register_streams() -> None:
    """Adds the rows; may be called twice."""
    registry.register("stage kind", "toy_writer", f"{__name__}:WriterSpec")
    registry.register("stage kind", "toy_voice", f"{__name__}:VoiceSpec")


def stream_config(
    stages: Mapping[str, Mapping[str, Any]], outputs: list[str], **stages_options: Mapping[str, Any]
) -> OmniConfig:
    """stages: readers by name -> their `inputs`, after a writer `talker`; more keys of a stage by its name."""
    register_streams()
    sections: dict[str, Any] = {"talker": {"kind": "toy_writer"}}
    sections |= {name: {"kind": "toy_voice", "inputs": dict(inputs)} for name, inputs in stages.items()}
    for name, options in stages_options.items():
        sections[name] |= options
    return load_config({"stages": sections, "outputs": outputs})


def streamed(source: str, **keys: Any) -> dict[str, Any]:
    """A streamed edge."""
    return {"from": source, "stream": keys}
