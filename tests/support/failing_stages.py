"""Stage kinds that fail on a prompt's command, for configs that a server loads: `import: support.failing_stages`.

`failing_text` and `failing_picture` are those of `support.toy_engine`; a prompt that says `do=WORD` makes its
task misbehave so: a word of ToyEngine's, or one of RUBBISH, or `sleep`, or `secret`. Any other prompt is answered.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable
from typing import Any

import torch
from support.toy_engine import (
    PictureEngine,
    PictureSpecimen,
    TextEngine,
    TextSpecimen,
    ToyEngine,
    Work,
    register_toys,
)

from vllm_omni import registry
from vllm_omni.messages import StageDone, StageEvent, StageProgress, StageTask
from vllm_omni.payload import StagePayload

SLEEP_S = 8.0  # how long a step takes that `sleep` makes slow
SECRET = "/srv/hidden/models/weights.bin"
Rubbish = Callable[["ToyEngine", str], list[Any]]


def _done(meta: dict[str, Any], metrics: Any = None) -> Rubbish:
    def make(engine: ToyEngine, request_id: str) -> list[Any]:
        return [StageDone(StagePayload(request_id, engine.stage.name, meta=meta), metrics or {})]

    return make


# word -> the events that come instead of an answer
RUBBISH: dict[str, Rubbish] = {
    "no_event": lambda engine, request_id: [None],
    "text_for_event": lambda engine, request_id: ["done"],
    "text_is_number": _done({"text": 7, "completions": [{"text": 7, "token_ids": [], "finish_reason": "stop"}]}),
    "completions_is_text": _done({"text": "x", "completions": "rubbish"}),
    "metrics_are_words": _done(
        {"text": "x", "completions": [{"text": "x", "token_ids": [], "finish_reason": "stop"}]},
        {"steps": "rubbish", "tokens": None},
    ),
    "progress_is_nan": lambda engine, request_id: [StageProgress(request_id, 1, math.nan, "")],  # type: ignore[arg-type]
    "progress_is_negative": lambda engine, request_id: [StageProgress(request_id, -5, 0, "")],
    "progress_text_is_number": lambda engine, request_id: [StageProgress(request_id, 1, 2, 7)],  # type: ignore[arg-type]
    "picture_is_nan": lambda engine, request_id: [
        StageDone(StagePayload(request_id, engine.stage.name, {"image": torch.full((1, 8, 8, 3), math.nan)}))
    ],
    "picture_is_flat": lambda engine, request_id: [
        StageDone(StagePayload(request_id, engine.stage.name, {"image": torch.zeros(3, dtype=torch.uint8)}))
    ],
}


class Failing(ToyEngine):
    """Reads from the prompt what a task is to do wrong."""

    def submit(self, task: StageTask) -> None:
        word = _command(task)
        params: Any = task.params
        super().submit(dataclasses.replace(task, params=dataclasses.replace(params, do=word)))

    def _advance(self, request_id: str, work: Work) -> list[StageEvent]:
        params: Any = work.task.params
        if params.do in RUBBISH and work.step == 1:
            del self.work[request_id]
            return RUBBISH[params.do](self, request_id)
        return super()._advance(request_id, work)

    def _misbehave(self, request_id: str, do: str | None) -> None:
        if do == "sleep":
            time.sleep(SLEEP_S)
        if do == "secret":
            raise OSError(f"{SECRET} of <Weights object at 0x7f3a5c0e91b0> is unreadable \ud800")
        super()._misbehave(request_id, do)


class FailingText(Failing, TextEngine):
    pass


class FailingPicture(Failing, PictureEngine):
    pass


class FailingTextSpec(TextSpecimen):
    engine_type = FailingText

    def cache_key(self, task: StageTask) -> str | None:
        """Nothing is kept, so that an answer shows that the stage works."""
        return None


class FailingPictureSpec(PictureSpecimen):
    engine_type = FailingPicture


def _command(task: StageTask) -> str | None:
    found = re.search(r"do=(\w+)", str(task.request.prompt))
    return found.group(1) if found else None


register_toys()
registry.register("stage kind", "failing_text", f"{__name__}:FailingTextSpec")
registry.register("stage kind", "failing_picture", f"{__name__}:FailingPictureSpec")
