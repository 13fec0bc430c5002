"""Toy stages that show what only a process of its own can do: `apart_text` is `toy_text`, and some prompts do harm.

A prompt `do=WORD` makes the stage, in its first step: `garbage` (write to its parent what is no message), `segfault`,
`odd` (report what cannot be sent), `print`, `log`.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import stat
import sys
from pathlib import Path
from typing import Any

from support.toy_engine import TextEngine, TextSpecimen, Work, register_toys

from vllm_omni import registry
from vllm_omni.messages import StageEvent, StageProgress


class ApartText(TextEngine):
    def _advance(self, request_id: str, work: Work) -> list[StageEvent]:
        do = self.words(work).removeprefix("do=")
        if work.step == 0 and do in HARM:
            found: list[StageEvent] = HARM[do](request_id) or []
            if found:
                return found
        return super()._advance(request_id, work)


class ApartSpec(TextSpecimen):
    engine_type = ApartText


def _to_parent(content: bytes) -> None:
    """Over the connection of this process's one stage, which is the socket beside the one that stages come by."""
    for file in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the descriptor of the folder itself
            if file.name != sys.argv[1] and stat.S_ISSOCK(os.fstat(int(file.name)).st_mode):
                os.write(int(file.name), content)


def _log(request_id: str) -> None:
    logging.getLogger("vllm_omni.toy").warning("step of %s", request_id)


HARM: dict[str, Any] = {
    "garbage": lambda request_id: _to_parent(os.urandom(3) + b"\xff" + b"\x00\x00" * 500),
    "segfault": lambda request_id: ctypes.string_at(0),
    "odd": lambda request_id: [StageProgress(request_id, 1, 2, object())],  # type: ignore[arg-type]
    "print": lambda request_id: print("printed by", request_id, flush=True),
    "log": _log,
}


register_toys()
registry.register("stage kind", "apart_text", f"{__name__}:ApartSpec")
