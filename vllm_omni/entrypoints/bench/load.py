"""When the requests of a load are sent: so many at a time (closed loop), or at random moments (open loop)."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vllm_omni.entrypoints.bench.answer import Answer
from vllm_omni.entrypoints.bench.mix import BenchRequest

Work = Coroutine[Any, Any, None]
OnEnd = Callable[[Answer], None]


class Target(Protocol):
    """Who answers."""

    async def ask(self, request: BenchRequest, answer: Answer) -> None:
        """Notes in `answer` what comes, and what goes wrong; raises nothing for either."""


@dataclass(frozen=True, slots=True)
class Load:
    """concurrency: a closed loop of so many clients, each of which waits for its answer. rate: an open loop, in which
    requests come by a Poisson process, so many each second, however long the answers take.
    """

    concurrency: int | None = None
    rate: float | None = None
    seed: int = 0  # of the moments

    async def run(self, target: Target, requests: Sequence[BenchRequest], on_end: OnEnd = lambda answer: None) -> Run:
        """Every request once, and its answer in the same order."""
        began_s = time.perf_counter()
        answers: list[Answer | None] = [None] * len(requests)

        async def ask(index: int, due_s: float | None = None) -> None:
            answer = Answer(requests[index].work)
            answer.began_s = answer.began_s if due_s is None else due_s
            await target.ask(requests[index], answer)
            answer.ended_s = time.perf_counter()
            answers[index] = answer
            on_end(answer)

        if self.rate is None:
            numbers = iter(range(len(requests)))  # shared: whoever is free takes the next one

            async def client() -> None:
                for number in numbers:
                    await ask(number)

            await _all([client() for _ in range(min(self.concurrency or 1, len(requests)))])
        else:
            await _all([_at(due_s, ask(index, due_s)) for index, due_s in enumerate(self._arrivals(began_s, requests))])
        found = [answer for answer in answers if answer is not None]
        return Run(found, began_s, time.perf_counter() - began_s)

    def _arrivals(self, began_s: float, requests: Sequence[BenchRequest]) -> list[float]:
        assert self.rate is not None
        draws = random.Random(self.seed)
        moments = [began_s]
        for _ in requests[1:]:
            moments.append(moments[-1] + draws.expovariate(self.rate))
        return moments


@dataclass(frozen=True, slots=True)
class Run:
    """What a load has brought."""

    answers: Sequence[Answer]
    began_s: float
    wall_s: float


async def _at(due_s: float, work: Work) -> None:
    await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
    await work


async def _all(works: Sequence[Work]) -> None:
    """To the end, or to the first of our own mistakes, which cancels the rest."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
