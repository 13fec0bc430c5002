"""Small requests to stages in processes, one hundred for each input: neither this process nor a stage's grows."""

from __future__ import annotations

from random import Random

import support.apart_stages  # noqa: F401
from fuzz.rest import SHARED, Belongings, misplaced
from support.belongings import descriptors, resident_bytes
from support.driver import Driver
from support.loop import request
from support.toy_engine import TextParams, toy_config, toy_stage

from vllm_omni.executor.omni_executor import OmniExecutor
from vllm_omni.executor.pipeline import Pipeline

NUM_REQUESTS = 100
NUM_FIRST = 5  # inputs in which pools and allocators fill
MOST_GROWTH = 8 * 2**20  # bytes, from then on
MOST_SEGMENTS = 8  # descriptors of shared memory more than then: what is lent at once depends on time, and is kept
LONG = "x" * 20_000  # whose words travel in shared memory


class Soak:
    """Two toy stages, which answer every request both."""

    def __init__(self) -> None:
        stages = {name: toy_stage(name, "apart_text", executor="process") for name in ("text_a", "text_b")}
        self._driver = Driver(OmniExecutor(Pipeline(toy_config(stages=stages, outputs=("text_a", "text_b")))))
        self._num_inputs = 0
        self._first: tuple[list[object], list[int], list[int]] | None = None

    def __call__(self, random: Random) -> str:
        for number in range(NUM_REQUESTS):
            prompt = LONG if random.random() < 0.1 else "ab" * random.randint(1, 9)
            given = request(f"{number}", prompt, params=TextParams(steps=random.randint(1, 3)))
            if random.random() < 0.1:
                self._driver.loop.add_request(given)
                self._driver.loop.step()
                self._driver.loop.abort(given.request_id)
                self._driver.loop.take_outputs()
            else:
                assert self._driver.answer(given, stream=random.random() < 0.3).error is None
            self._driver.outputs.clear()
        self._check()
        return f"{NUM_REQUESTS} requests"

    def close(self) -> None:
        self._driver.loop.shutdown()

    def _check(self) -> None:
        loop = self._driver.loop
        self._driver.until(lambda: not misplaced(loop), 5.0)
        loop.check_integrity()
        pids = ["self", *(status["pid"] for status in loop.get_status()["stages"].values())]
        held = [descriptors(pid) for pid in pids]
        shared = [sum(kinds.pop(kind) for kind in list(kinds) if kind.startswith(SHARED)) for kinds in held]
        now = [Belongings.now(), held[1:]], shared, [resident_bytes(pid) for pid in pids]
        self._num_inputs += 1
        if self._num_inputs <= NUM_FIRST:
            self._first = now
        assert self._first is not None
        assert now[0] == self._first[0], f"{now[0]}, at first {self._first[0]}"
        more = [after - before for after, before in zip(now[1], self._first[1], strict=True)]
        growth = [after - before for after, before in zip(now[2], self._first[2], strict=True)]
        num_requests = self._num_inputs * NUM_REQUESTS
        assert max(more) <= MOST_SEGMENTS, f"{more} segments more after {num_requests} requests"
        assert max(growth) < MOST_GROWTH, f"{growth} bytes more after {num_requests} requests"
