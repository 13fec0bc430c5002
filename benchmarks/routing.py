"""Routing of tasks to the replicas of a stage, by the package's own router, without any model: how long a decision
takes, what is kept for a request, how even the load is, and how often a prompt finds a replica that holds its start.

Simulated: each replica works on its tasks at a fixed rate, and holds the beginnings of the last prompts that it was
given. Arrivals are random; how often a beginning is asked for falls with its rank (Zipf).
"""

from __future__ import annotations

import heapq
import random
import time
import tracemalloc
from collections import OrderedDict
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

from benchmarks.limits import Limits
from benchmarks.measure import Options, Report, Table
from vllm_omni.core.routing.replica_router import ReplicaRouter

NUM_REPLICAS = (10, 100, 1_000, 10_000)
NUM_PREFIXES = 5_000  # distinct beginnings of prompts
PREFIXES_HELD = 32  # by a replica's KV pool
BLOCKS = (1, 2, 4, 8, 16)  # hashes of a prompt
LOAD = 0.8  # of all replicas together
SEED = 7


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one number of replicas and one way to route."""

    num_replicas: int
    affinity: bool
    decision_us: float  # assign and finish of one task
    bytes_per_task: float  # that the router keeps for an outstanding one, its share of what it remembers included
    hit_rate: float  # tasks whose replica held their prompt's beginning
    wait_ratio: float  # mean of the work ahead of a task, in mean tasks
    worst_wait: float  # 99.9% wait no longer than this, in mean tasks


def run(options: Options, limits: Limits | None) -> Report:
    tasks = 2_000 if options.is_quick else 60_000
    sizes = NUM_REPLICAS[:2] if options.is_quick else NUM_REPLICAS
    found = [simulate(number, tasks, affinity) for number in sizes for affinity in (False, True)]
    rows = [
        (
            f"{each.num_replicas:,}",
            "with affinity" if each.affinity else "least work alone",
            f"{each.decision_us:.1f}",
            f"{each.bytes_per_task:,.0f}",
            f"{each.hit_rate:.1%}",
            f"{each.wait_ratio:.2f}",
            f"{each.worst_wait:.1f}",
        )
        for each in found
    ]
    columns = ("replicas", "routing", "us a task", "bytes a task", "prefix hits", "mean work ahead", "99.9% of tasks")
    title = f"{tasks:,} tasks, load {LOAD:.0%}, {NUM_PREFIXES:,} beginnings by Zipf's law"
    notes = (
        "Work ahead is in tasks of mean size. Time includes one `assign` and one `finish`, in one thread; bytes are"
        " those of the router alone, what it remembers of prefixes included.",
    )
    return Report("routing", [Table(title, columns, rows)], notes, {"cases": [asdict(each) for each in found]})


def simulate(num_replicas: int, num_tasks: int, affinity: bool) -> Figures:
    """Tasks arrive until `num_tasks` are routed; the times and waits of the first half count as warming up."""
    draw = random.Random(SEED)
    weights = list(accumulate(1 / (rank + 1) for rank in range(NUM_PREFIXES)))
    ranks = draw.choices(range(NUM_PREFIXES), cum_weights=weights, k=num_tasks)
    sizes = [draw.expovariate(1.0) for _ in range(num_tasks)]
    gaps = [draw.expovariate(num_replicas * LOAD) for _ in range(num_tasks)]
    hashes = [tuple(hash((rank, block)) for block in BLOCKS) for rank in range(NUM_PREFIXES)]
    router, held = ReplicaRouter(num_replicas), [OrderedDict[int, None]() for _ in range(num_replicas)]
    free_at = [0.0] * num_replicas
    ends: list[tuple[float, str]] = []
    now, spent_s, num_hits, waits = 0.0, 0.0, 0, list[float]()
    for number, (rank, size, gap) in enumerate(zip(ranks, sizes, gaps, strict=True)):
        now += gap
        name, prefixes = str(number), hashes[rank] if affinity else ()
        due: list[str] = []
        while ends and ends[0][0] <= now:
            due.append(heapq.heappop(ends)[1])
        begin = time.perf_counter()
        for ended in due:
            router.finish(ended)
        replica = router.assign(name, size, prefixes)
        spent_s += time.perf_counter() - begin
        assert replica is not None
        if number >= num_tasks // 2:
            num_hits += rank in held[replica]
            waits.append(max(free_at[replica] - now, 0.0))
        held[replica][rank] = None
        held[replica].move_to_end(rank)
        if len(held[replica]) > PREFIXES_HELD:
            held[replica].popitem(last=False)
        free_at[replica] = max(free_at[replica], now) + size
        heapq.heappush(ends, (free_at[replica], name))
    waits.sort()
    return Figures(
        num_replicas,
        affinity,
        1e6 * spent_s / num_tasks,
        _bytes_per_task(num_replicas, hashes if affinity else [()]),
        num_hits / len(waits),
        sum(waits) / len(waits),
        waits[int(0.999 * len(waits))],
    )


def _bytes_per_task(num_replicas: int, hashes: list[Any]) -> float:
    """Beyond an idle router, with ten tasks on each replica."""
    num_tasks = 10 * num_replicas
    names = [str(number) for number in range(num_tasks)]
    router = ReplicaRouter(num_replicas)
    tracemalloc.start()
    try:
        for number, name in enumerate(names):
            router.assign(name, 1.0, hashes[number % len(hashes)])
        return tracemalloc.get_traced_memory()[0] / num_tasks
    finally:
        tracemalloc.stop()
