"""What has come for the diffusion stage and has not begun: whole tasks, and chunks of streamed inputs, in the order in
which they came. Runs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vllm_omni.engine.diffusion.job import DiffusionJob


@dataclass(frozen=True, slots=True)
class Arrival:
    """A task whose inputs are there, or a chunk for one that runs."""

    job: DiffusionJob
    chunk: object = None  # what a streamed port brought, unchecked; None for a task


class ArrivalQueue:
    """What a held job has waiting stays, and so does all but the first heavy preparation of a step."""

    def __init__(self) -> None:
        self._arrivals: list[Arrival] = []

    @property
    def is_ready(self) -> bool:
        """Whether a step would begin something."""
        return any(not arrival.job.is_held for arrival in self._arrivals)

    def add(self, arrival: Arrival) -> None:
        self._arrivals.append(arrival)

    def due(self) -> Iterator[Arrival]:
        """Takes out what begins in this step, in order; the caller may drop the job of the one that it was given."""
        has_heavy, index = False, 0
        while index < len(self._arrivals):
            job = self._arrivals[index].job
            is_heavy = job.is_heavy and not job.is_prepared
            if job.is_held or (is_heavy and has_heavy):
                index += 1
            else:
                has_heavy = has_heavy or is_heavy
                yield self._arrivals.pop(index)

    def drop(self, job: DiffusionJob) -> None:
        """Takes out all that waits for a job."""
        self._arrivals = [arrival for arrival in self._arrivals if arrival.job is not job]
