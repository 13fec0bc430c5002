"""Which replica of a stage a task goes to: the one with the least outstanding work, unless another probably still holds
the beginning of its prompt and is not too far ahead.

Counts work and holds no task; knows no clock, and takes no longer for a thousand replicas than for ten.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Collection, Hashable, Sequence

from vllm_omni.errors import SchedulerError

MAX_LEAD = 4.0  # jobs of a task's own size that a replica which holds its prefix may be ahead of the idlest
MAX_PREFIXES = 65_536  # that are remembered
MAX_HOMES = 8  # replicas that are remembered of a prefix, the latest
MIN_JOB_SIZE = 1e-3


class ReplicaRouter:
    """A task is outstanding from `assign` until `finish`. Replicas are numbers; all are open at first."""

    def __init__(self, num_replicas: int) -> None:
        self._work = [0.0] * num_replicas
        self._num_tasks = [0] * num_replicas
        # Of each open replica its place in the order: the least work first, then whoever was given a task longest ago.
        # The heap also holds outdated places, which are dropped as they come to the top.
        self._place: list[tuple[float, int, int] | None] = [(0.0, number, number) for number in range(num_replicas)]
        self._heap = [place for place in self._place if place is not None]
        self._num_assigned = num_replicas
        self._tasks: dict[str, tuple[int, float]] = {}  # request id -> its replica and size
        self._homes: OrderedDict[Hashable, tuple[int, ...]] = OrderedDict()

    def assign(
        self, request_id: str, job_size: float, prefixes: Sequence[Hashable] = (), avoid: Collection[int] = ()
    ) -> int | None:
        """The replica that a task goes to, and its work is outstanding there from now on; None where none is open.

        prefixes: hashes of ever longer beginnings of its prompt. avoid: replicas that it may not go to.
        """
        if request_id in self._tasks:
            raise SchedulerError(f"request {request_id!r} is with replica {self._tasks[request_id][0]} already")
        size = max(job_size, MIN_JOB_SIZE)
        idlest = self._idlest(avoid)
        if idlest is None:
            return None
        replica = self._home(prefixes, avoid, self._work[idlest] + MAX_LEAD * size)
        replica = idlest if replica is None else replica
        self._tasks[request_id] = (replica, size)
        self._num_assigned += 1
        self._add(replica, size, self._num_assigned)
        for prefix in prefixes:
            self._remember(prefix, replica)
        return replica

    def finish(self, request_id: str) -> None:
        """A task is outstanding no longer; unknown ones are fine."""
        replica, size = self._tasks.pop(request_id, (None, 0.0))
        if replica is not None:
            place = self._place[replica]
            self._add(replica, -size, place[1] if place is not None else self._num_assigned)

    def set_open(self, replica: int, is_open: bool) -> None:
        """Whether a replica is given tasks; those that it has are not concerned."""
        if is_open != (self._place[replica] is not None):
            self._place[replica] = (self._work[replica], self._num_assigned, replica) if is_open else None
            self._push(replica)

    def forget(self, replica: int) -> None:
        """A replica has lost the prefixes that it held."""
        for prefix, homes in list(self._homes.items()):
            if replica in homes:
                self._homes[prefix] = tuple(home for home in homes if home != replica)

    def outstanding(self, replica: int) -> float:
        """The sum of the sizes of its unfinished tasks."""
        return self._work[replica]

    def check_integrity(self) -> None:
        """Raises SchedulerError when the work of a replica is not that of its tasks."""
        for replica, work in enumerate(self._work):
            sizes = [size for number, size in self._tasks.values() if number == replica]
            if len(sizes) != self._num_tasks[replica] or abs(work - sum(sizes)) > 1e-6 * (1 + sum(sizes)):
                raise SchedulerError(f"replica {replica}: {work} outstanding, its tasks are {sizes}")

    def _idlest(self, avoid: Collection[int]) -> int | None:
        avoided: list[tuple[float, int, int]] = []
        found = None
        while self._heap and found is None:
            place = self._heap[0]
            if self._place[place[2]] != place:
                heapq.heappop(self._heap)
            elif place[2] in avoid:
                avoided.append(heapq.heappop(self._heap))
            else:
                found = place[2]
        for place in avoided:
            heapq.heappush(self._heap, place)
        return found

    def _home(self, prefixes: Sequence[Hashable], avoid: Collection[int], max_work: float) -> int | None:
        """The idlest of the open replicas that hold the longest beginning, where it has no more work than that."""
        for prefix in reversed(prefixes):
            homes = [home for home in self._homes.get(prefix, ()) if self._place[home] is not None]
            homes = [home for home in homes if home not in avoid and self._work[home] <= max_work]
            if homes:
                return min(homes, key=self._work.__getitem__)
        return None

    def _remember(self, prefix: Hashable, replica: int) -> None:
        homes = self._homes.pop(prefix, ())
        others = homes if replica not in homes else tuple(home for home in homes if home != replica)
        self._homes[prefix] = (replica, *others[: MAX_HOMES - 1])
        if len(self._homes) > MAX_PREFIXES:
            self._homes.popitem(last=False)

    def _add(self, replica: int, size: float, turn: int) -> None:
        self._num_tasks[replica] += 1 if size > 0 else -1
        # sums of fractions drift; without a task there is no work
        self._work[replica] = self._work[replica] + size if self._num_tasks[replica] else 0.0
        if self._place[replica] is not None:
            self._place[replica] = (self._work[replica], turn, replica)
            self._push(replica)

    def _push(self, replica: int) -> None:
        place = self._place[replica]
        if place is not None:
            heapq.heappush(self._heap, place)
        if len(self._heap) > 4 * len(self._place) + 16:
            self._heap = [place for place in self._place if place is not None]
            heapq.heapify(self._heap)
