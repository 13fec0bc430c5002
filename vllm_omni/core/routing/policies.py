"""Which waiting request starts next.

A policy is stateless: it sees who waits and what time it is, and so can be changed in flight.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

from vllm_omni import registry
from vllm_omni.config.schema import SchedulerConfig

MIN_JOB_SIZE = 1e-3


class Waiting(Protocol):
    """What a policy may know of a request. `order` counts admissions: the smaller came first."""

    @property
    def order(self) -> int: ...

    @property
    def priority(self) -> str: ...

    @property
    def job_size(self) -> float: ...

    @property
    def admitted_s(self) -> float: ...


W = TypeVar("W", bound=Waiting)


class Policy(Protocol):
    """A row of the table "scheduling policy"; constructed with the scheduler's config."""

    def pick(self, waiting: Iterable[W], now: float) -> W:
        """The request that starts next, out of at least one. Nobody may wait for ever while others keep arriving."""


class FIFOPolicy:
    """First come, first served."""

    def __init__(self, config: SchedulerConfig) -> None: ...

    def pick(self, waiting: Iterable[W], now: float) -> W:
        return min(waiting, key=lambda request: request.order)


class PriorityPolicy:
    """The largest weight(priority) * time waited; the weight alone decides between requests that have not waited."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._weights = dict(config.priority_weights)

    def pick(self, waiting: Iterable[W], now: float) -> W:
        def rank(request: W) -> tuple[float, float, int]:
            weight = self._weights[request.priority]
            return (weight * max(now - request.admitted_s, 0.0), weight, -request.order)

        return max(waiting, key=rank)


class ShortestJobFirstPolicy:
    """The smallest job, where a request that has waited t seconds counts as 1 / (1 + t) of its size."""

    def __init__(self, config: SchedulerConfig) -> None: ...

    def pick(self, waiting: Iterable[W], now: float) -> W:
        def rank(request: W) -> tuple[float, int]:
            waited_s = max(now - request.admitted_s, 0.0)
            return (max(request.job_size, MIN_JOB_SIZE) / (1.0 + waited_s), request.order)

        return min(waiting, key=rank)


def make_policy(config: SchedulerConfig) -> Policy:
    """The policy that the config names; ConfigError for a name without a row in the registry."""
    name = str.__str__(config.policy)  # the bare value, for a member of the enum and for a registered name alike
    policy: Policy = registry.resolve("scheduling policy", name)(config)
    return policy
