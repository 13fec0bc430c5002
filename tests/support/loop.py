"""What tests of the loop share: a loop over toy stages, requests, a clock that stands still, and running to the end."""

from __future__ import annotations

from typing import Any

from support.toy_engine import toy_config

from vllm_omni import AsyncOmni, Omni
from vllm_omni.config.schema import OmniConfig
from vllm_omni.executor.omni_executor import OmniExecutor
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.request import OmniOutput, OmniRequest


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def executor(config: OmniConfig | None = None, **changes: Any) -> OmniExecutor:
    config = config or toy_config(**changes)
    return OmniExecutor(Pipeline(config))


def request(name: str = "r", prompt: str = "ab", **changes: Any) -> OmniRequest:
    return OmniRequest(prompt=prompt, request_id=name, **changes)


def engine(loop: OmniExecutor | Omni | AsyncOmni, stage: str) -> Any:
    """What runs a stage, in the loop or in what drives one."""
    loop = loop if isinstance(loop, OmniExecutor) else loop._executor
    return loop._stages[stage].hosts[0].executor._engine


def finish(loop: OmniExecutor, max_steps: int = 200) -> dict[str, OmniOutput]:
    """All final outputs; fails when there are two for a request, or when the loop does not come to rest."""
    outputs: dict[str, OmniOutput] = {}
    for _ in range(max_steps):
        for output in loop.step():
            if output.finished:
                assert output.request_id not in outputs
                outputs[output.request_id] = output
        loop.check_integrity()
        if not loop.has_work():
            return outputs
    raise AssertionError(f"still at work after {max_steps} steps: {loop.get_status()}")


def answer(loop: OmniExecutor, given: OmniRequest) -> OmniOutput:
    loop.add_request(given)
    return finish(loop)[given.request_id]


def paused(loop: OmniExecutor, stage: str) -> set[str]:
    """The requests for which a stage is told to make no more rows."""
    running = loop.scheduler._requests.running
    return {request_id for request_id, state in running.items() if stage in state.streams.paused}
