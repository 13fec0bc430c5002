"""Two small stage kinds that make sound piece by piece, a ramp over two channels: "toy_sound" by itself, "toy_speaker"
from the codes that a "toy_writer" streams to it.
"""

from __future__ import annotations

from typing import Any

import torch
from support.toy_engine import ToyEngine, ToySpec, Work, toy_config, toy_stage
from support.toy_stream import ROWS, StreamSpec, Voice, stream_config, streamed
from support.toy_stream import Work as StreamWork

from vllm_omni import registry
from vllm_omni.config.schema import OmniConfig
from vllm_omni.messages import StageDone, StageEvent, StageRows, StageTask
from vllm_omni.payload import StagePayload, StageSignature, TensorSpec

RATE = 16_000
PIECES = (5, 0, 3, 7)  # samples that a step makes, again and again
SCALE = 2.0**-12


def ramp(start: int, stop: int) -> torch.Tensor:
    """[n, 2]: sample i is i steps high, negative in the second channel."""
    return torch.arange(start, stop)[:, None] * torch.tensor([SCALE, -SCALE])


def num_samples(num_steps: int) -> int:
    return sum(PIECES[step % len(PIECES)] for step in range(num_steps))


class SoundEngine(ToyEngine):
    """The toy text's parameters; each step adds rows to the port "audio". `do` may be flat_rows, no_rate, nan_rows too:
    pieces that are no sound; other_port: rows that are not for the caller.
    """

    def _advance(self, request_id: str, work: Work) -> list[StageEvent]:
        do = work.task.params.do  # type: ignore[attr-defined]
        events = super()._advance(request_id, work)
        if work.step == 0 or do == "lose":
            return events
        rows = ramp(num_samples(work.step - 1), num_samples(work.step))
        meta = {} if do == "no_rate" else {"sample_rate": RATE}
        if do == "flat_rows":
            rows = rows[:, 0]
        if do == "nan_rows":
            rows = rows / 0.0 * 0.0
        is_last = isinstance(events[-1], StageDone)
        piece = StageRows(request_id, "codes" if do == "other_port" else "audio", rows, is_last, meta)
        return [piece, *events[1:]]

    def make(self, task: StageTask) -> StagePayload:
        params: Any = task.params
        whole = ramp(0, num_samples(params.steps or 2)).T[None]
        return StagePayload(task.request_id, self.stage.name, {"audio": whole}, {"sample_rate": RATE})


class SpeakerEngine(Voice):
    """The sound of a code is the code itself, [i, i] steps high; misbehaves as Voice."""

    def advance(self, request_id: str, work: StreamWork, params: Any) -> list[StageEvent]:
        return [self._as_sound(event) for event in super().advance(request_id, work, params)]

    def finish(self, request_id: str, port: str) -> StageDone:
        whole = torch.cat([torch.zeros(0, 2), *self.work.pop(request_id).made]) * SCALE
        payload = StagePayload(request_id, self.stage.name, {"audio": whole.T[None]}, {"sample_rate": RATE})
        return StageDone(payload, {"steps": 1})

    def _as_sound(self, event: StageEvent) -> StageEvent:
        if not isinstance(event, StageRows):
            return event
        return StageRows(event.request_id, "audio", event.rows * SCALE, meta={"sample_rate": RATE})


class SoundSpec(ToySpec):
    """Of a SoundEngine."""

    engine_type = SoundEngine
    signature = StageSignature(
        outputs={"audio": TensorSpec((1, 2, "n")), "codes": TensorSpec(("T",))},
        results=frozenset({"audio"}),
        streamed_outputs=frozenset({"audio", "codes"}),
    )


class SpeakerSpec(StreamSpec):
    """Of a SpeakerEngine."""

    engine_type = SpeakerEngine
    signature = StageSignature(
        inputs={"codes": ROWS},
        outputs={"audio": TensorSpec((1, 2, "n"))},
        required_inputs=frozenset({"codes"}),
        results=frozenset({"audio"}),
        streamed_inputs=frozenset({"codes"}),
        streamed_outputs=frozenset({"audio"}),
    )


def register_sound() -> None:
    registry.register("stage kind", "toy_sound", "support.toy_sound:SoundSpec")
    registry.register("stage kind", "toy_speaker", "support.toy_sound:SpeakerSpec")


def speech_config(step_s: float = 0.0, **changes: Any) -> OmniConfig:
    """A stage that writes beside one that sounds."""
    register_sound()
    stages = {
        "text": toy_stage("text", "toy_text", step_s=step_s),
        "voice": toy_stage("voice", "toy_sound", step_s=step_s),
    }
    return toy_config(**{"stages": stages, "outputs": ("text", "voice"), **changes})


def chain_config(**keys: Any) -> OmniConfig:
    """talker ⇶ speaker; keys: of the stream between them."""
    register_sound()
    inputs = {"codes": streamed("talker.codes", **keys)}
    return stream_config({"speaker": inputs}, ["speaker"], speaker={"kind": "toy_speaker"})
