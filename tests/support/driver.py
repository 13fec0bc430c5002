"""Runs a loop until something is so, as callers of the loop do, and notes how long it was held up."""

from __future__ import annotations

import time
from typing import Any

from vllm_omni.executor.omni_executor import OmniExecutor
from vllm_omni.request import OmniOutput, OmniRequest


class Driver:
    """Runs a loop and notes how long its longest step took."""

    def __init__(self, loop: OmniExecutor) -> None:
        self.loop = loop
        self.outputs: list[OmniOutput] = []
        self.longest_s = 0.0

    def until(self, condition: Any, timeout_s: float = 20.0) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            begin = time.monotonic()
            self.outputs += self.loop.step()
            self.longest_s = max(self.longest_s, time.monotonic() - begin)
            self.loop.wait()
            time.sleep(0.001)
            assert time.monotonic() < end, self.loop.get_status()

    def answer(self, given: OmniRequest, stream: bool = False) -> OmniOutput:
        self.loop.add_request(given, stream=stream)
        self.until(lambda: self.final(given.request_id) is not None)
        found = self.final(given.request_id)
        assert found is not None
        return found

    def final(self, request_id: str) -> OmniOutput | None:
        found = [output for output in self.outputs if output.finished and output.request_id == request_id]
        assert len(found) <= 1
        return found[0] if found else None

    def until_ready(self, stage: str) -> None:
        self.until(lambda: self.loop.get_status()["stages"][stage]["state"] == "ready")
