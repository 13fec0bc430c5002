"""A loop whose stages are processes, requests whose results are known, and what must be so when they have ended."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fuzz.mortal_pipeline import LIMIT_S, Asked, Scene, calm_results, check_same
from fuzz.rest import Belongings, misplaced
from support.driver import Driver

from vllm_omni.errors import RequestTimeoutError, StageError, StageUnavailableError
from vllm_omni.executor.omni_executor import OmniExecutor
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.request import OmniOutput, OmniRequest

GRACE_S = 2.0  # how much later than its deadline a request may end
STEP_S = 1.0  # the longest step of the loop, which waits for nobody
REST_S = 5.0  # in which threads and descriptors of what has ended are gone


@dataclass
class Given:
    """A request on its way."""

    asked: Asked
    request: OmniRequest
    stream: bool = False
    begun_s: float = 0.0
    ended_s: float | None = None

    @property
    def is_hasty(self) -> bool:
        return self.request.timeout_s != LIMIT_S


class MortalLoop:
    """Ready, and all that is known has been asked once."""

    def __init__(self, scene: Scene) -> None:
        self.known = scene.known
        self._calm = calm_results(scene)
        self._num_requests = 0
        self.loop = OmniExecutor(Pipeline(scene.config))
        self._driver = Driver(self.loop)
        self._given: list[Given] = []
        self.serve(self.known)  # what is made at the first request
        self.forget()
        self._belongings = Belongings.now()

    def stages_of(self, each: Asked) -> frozenset[str]:
        """Those that work for a request."""
        return self.loop.pipeline.graph.before(each.outputs) | set(each.outputs)

    def given(self, each: Asked, stream: bool = False, timeout_s: float = LIMIT_S) -> Given:
        self._num_requests += 1
        return Given(each, each.request(f"{self._num_requests} {each.name}", timeout_s), stream)

    def submit(self, given: Sequence[Given]) -> None:
        self._given += given
        for each in given:
            each.begun_s = time.monotonic()
            self.loop.add_request(each.request, stream=each.stream)

    def run(self, condition: Callable[[], object] = lambda: True, watch: Callable[[], None] = lambda: None) -> None:
        """Steps the loop until then, at least once. watch: is called after each step."""
        begun = [False]

        def is_so() -> bool:
            is_first, begun[0] = not begun[0], True
            for each in self._given:
                if each.ended_s is None and self._driver.final(each.request.request_id):
                    each.ended_s = time.monotonic()
            watch()
            return not is_first and bool(condition())

        self._driver.until(is_so, 2 * LIMIT_S)

    def serve(self, asked: Sequence[Asked]) -> None:
        """One after another, each of which is answered as if nothing had been."""
        for each in asked:
            given = self.given(each)
            self.submit([given])
            self.run(lambda given=given: given.ended_s is not None)  # type: ignore[misc]
            self.check_end(given, can_fail=False)

    def parts(self, given: Given) -> list[OmniOutput]:
        """The partial outputs so far."""
        name = given.request.request_id
        return [output for output in self._driver.outputs if output.request_id == name and not output.finished]

    def check_end(self, given: Given, can_fail: bool) -> str:
        """How a request has ended, in a word. can_fail: whether it may have, with the cause."""
        output = self._driver.final(given.request.request_id)
        assert output is not None and given.ended_s is not None and given.request.timeout_s is not None
        took_s = given.ended_s - given.begun_s
        assert took_s < given.request.timeout_s + GRACE_S, f"{given.request.request_id} ended after {took_s:.1f} s"
        if output.error is None:
            check_same(output, self.parts(given), self._calm[given.asked.name])
            return "retried" if any("retried" in counts for counts in output.metrics.values()) else "answered"
        if given.is_hasty and isinstance(output.error, RequestTimeoutError):
            return "timed out"
        assert can_fail and isinstance(output.error, StageError), f"{given.request.request_id}: {output.error}"
        assert str(output.error) and "stage" in str(output.error)
        return "refused" if isinstance(output.error, StageUnavailableError) else "failed"

    def statuses(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.loop.get_status()["stages"]
        return found

    def counts(self) -> Counter[str]:
        """Of the scheduler: requests that were taken, and how they ended."""
        found = self.loop.scheduler.get_metrics()
        return Counter({key: found[key] for key in ("admitted", "finished", "failed", "rejected", "aborted")})

    def ended(self) -> Counter[str]:
        """Of the outputs since the last look at them, as `counts` says it."""
        statuses = Counter(output.status.value for output in self._driver.outputs if output.finished)
        return statuses + Counter(admitted=sum(statuses.values()) - statuses["rejected"])

    def check_rest(self) -> None:
        """Nothing is done, and all is as it was at the beginning."""
        assert self._driver.longest_s < STEP_S, f"a step of the loop took {self._driver.longest_s:.2f} s"
        until = time.monotonic() + REST_S
        while (found := self._unrest()) and time.monotonic() < until:
            self.run()
        assert not found, found
        self.loop.check_integrity()
        for name, stats in self.loop.get_metrics()["stages"].items():
            assert not stats.get("running") and stats.get("num_free_blocks") == stats.get("num_blocks"), (name, stats)

    def forget(self) -> None:
        """What was asked and answered, and how long steps took."""
        self._driver.outputs.clear()
        self._given.clear()
        self._driver.longest_s = 0.0

    def close(self) -> None:
        self.loop.shutdown()

    def _unrest(self) -> list[str]:
        found = misplaced(self.loop)
        belongings = Belongings.now()
        if belongings != self._belongings:
            found.append(f"{belongings}, expected {self._belongings}")
        for name, status in self.statuses().items():
            if (status["state"], status["tasks"], status["waiting"]) != ("ready", 0, 0):
                found.append(f"{name}: {status}")
            if any(replica["outstanding"] for replica in status["replicas"]):
                found.append(f"{name}: work is outstanding")
        if self.loop.scheduler.in_flight() or self.loop.has_work():
            found.append("a request is in flight")
        return found
