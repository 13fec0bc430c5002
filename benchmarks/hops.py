"""What it costs to go from stage to stage, by where they run: in one thread, in a thread each, in a process each,
and as actors of a Ray on this machine, where that is installed.

First an edge alone, for a tensor of 1 kB, 1 MB and 64 MB: from the moment at which a stage gives it to that at which
the next one has it; on a machine with a GPU also of tensors there. Then two small pipelines, one request and eight at
once: in one of them the stages of a request follow each other, in the other they stream and overlap.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from benchmarks.limits import Limits
from benchmarks.measure import Options, Report, Table, median, with_spread

EXECUTORS = ("inline", "thread", "process")
RAY, LITTLE_CPU = "ray", 0.1
SIZES = {"1 kB": 1 << 10, "1 MB": 1 << 20, "64 MB": 1 << 26}
HOPS, QUICK_HOPS = 60, 3  # of each size
DEVICE_SIZES = ("1 MB", "64 MB")
CROWD = 8
IN_TURN, OVERLAPPING = "tiny_scene", "tiny_speech"
WORDS = {
    IN_TURN: "please paint a {word} star above a ring",
    OVERLAPPING: "read {word} 7 red",
}
NOTE = (
    "Goals of processes: a hop of 1 kB under 1 ms, one of 64 MB above half of a copy's rate; one request in at most 1.3"
    f" times the time of one thread, and {CROWD} at once sooner where stages overlap."
)

NOTE_WITHOUT_RAY = "Ray is not installed, so that nothing was measured of it."


def run(options: Options, limits: Limits | None = None) -> Report:
    from vllm_omni.utils.device import set_threads

    set_threads(options.threads)
    copy_s = {name: _copy_s(size, options) for name, size in SIZES.items()}
    executors = (*EXECUTORS, RAY) if find_spec(RAY) else EXECUTORS
    hops = {executor: _hops(executor, SIZES, options) for executor in executors}
    device_hops = device_edges(options)
    runs = {pipeline: _runs(pipeline, executors, options) for pipeline in WORDS}
    figures = {
        "copy_ms": {name: 1e3 * seconds for name, seconds in copy_s.items()},
        "hop_ms": _medians_ms(hops),
        "device_hop_ms": _medians_ms(device_hops),
        "copy_of_hop": copy_s["64 MB"] / median(hops["process"]["64 MB"]),
        "of_inline": {
            pipeline: [median(found["process"][kind]) / median(found["inline"][kind]) for kind in (0, 1)]
            for pipeline, found in runs.items()
        },
    }
    edges = [
        [name, f"{1e3 * copy_s[name]:.3f}", *(with_spread([1e3 * s for s in hops[one][name]], 3) for one in executors)]
        for name in SIZES
    ]
    tables = [Table("an edge, ms", ["size", "copy", *executors], edges)]
    if device_hops:
        tables.append(_device_table(device_hops))
    for pipeline, found in runs.items():
        rows = [[one, *(with_spread(times, 3) for times in found[one])] for one in executors]
        tables.append(Table(f"{pipeline}, s", ["stages", "one request", f"{CROWD} at once"], rows))
    notes = [NOTE] if RAY in executors else [NOTE, NOTE_WITHOUT_RAY]
    return Report("hops", tables, notes, figures)


def _copy_s(size: int, options: Options) -> float:
    """Of one thread, from memory to memory that was used before; the best of many."""
    import numpy as np

    source, target = np.ones(size, dtype=np.uint8), np.zeros(size, dtype=np.uint8)
    times = []
    for _ in range(QUICK_HOPS if options.is_quick else HOPS):
        begin = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - begin)
    return min(times)


def device_edges(options: Options) -> dict[str, dict[str, list[float]]]:
    """As `_hops`, by the way that a tensor on the GPU takes: by reference in one process, from process to process by a
    handle, and through the host's memory. Nothing without a GPU.
    """
    from vllm_omni.utils.device import is_cuda, resolve_device

    if not is_cuda(resolve_device()):
        return {}
    sizes = {name: SIZES[name] for name in DEVICE_SIZES}
    ways = {"by reference": ("inline", False), "by handle": ("process", False), "through the host": ("process", True)}
    return {
        way: _hops(executor, sizes, options, device="cuda", through_host=through_host)
        for way, (executor, through_host) in ways.items()
    }


def _hops(executor: str, sizes: Mapping[str, int], options: Options, **keys: Any) -> dict[str, list[float]]:
    """Size -> the seconds that each hop took, the first few left out. keys: further ones of `hop_config`."""
    from benchmarks.hop_stages import hop_config
    from vllm_omni import Omni

    count = QUICK_HOPS if options.is_quick else HOPS
    found: dict[str, list[float]] = {}
    config = hop_config(executor, **keys)
    with Omni(config, overrides=_overrides(executor, config["stages"]), progress=False) as omni:
        for name, size in sizes.items():
            outputs = [omni.generate(str(size))[0] for _ in range(count + 2)]
            for output in outputs:
                assert output.error is None and output.tensors["sink.bytes"][0] == size, output.error
            metrics = [output.metrics for output in outputs[2:]]
            found[name] = [each["sink"]["taken_s"] - each["source"]["given_s"] for each in metrics]
    return found


def _medians_ms(hops: Mapping[str, Mapping[str, list[float]]]) -> dict[str, dict[str, float]]:
    return {way: {name: 1e3 * median(each) for name, each in found.items()} for way, found in hops.items()}


def _device_table(hops: Mapping[str, Mapping[str, list[float]]]) -> Table:
    rows = [[name, *(with_spread([1e3 * s for s in way[name]], 3) for way in hops.values())] for name in DEVICE_SIZES]
    return Table("an edge of a tensor on the GPU, ms", ["size", *hops], rows)


def _overrides(executor: str, stages: Iterable[str]) -> list[str]:
    """Of Ray each stage asks for so little that all find room, whatever the machine has."""
    room = [f"{stage}.ray.num_cpus={LITTLE_CPU}" for stage in stages] if executor == RAY else []
    return [f"executor={executor}", *room]


def _runs(pipeline: str, executors: Sequence[str], options: Options) -> dict[str, tuple[list[float], list[float]]]:
    """Executor -> seconds of one request, and of a crowd; the executors in turn."""
    from contextlib import ExitStack

    from vllm_omni import Omni
    from vllm_omni.config.loader import load_config

    times: dict[str, tuple[list[float], list[float]]] = {executor: ([], []) for executor in executors}
    stages = load_config(pipeline).stages
    with ExitStack() as stack:
        sides = {
            executor: stack.enter_context(Omni(pipeline, overrides=_overrides(executor, stages), progress=False))
            for executor in executors
        }
        begin = time.monotonic()
        for repeat in range(-1, options.repeats):
            for executor, omni in sides.items():
                alone = _timed(omni, pipeline, 1, repeat)
                crowd = _timed(omni, pipeline, 2 if options.is_quick else CROWD, repeat)
                if repeat >= 0:  # the first warms up
                    times[executor][0].append(alone)
                    times[executor][1].append(crowd)
            if options.is_enough(repeat + 1, time.monotonic() - begin):
                break
    return times


def _timed(omni: Any, pipeline: str, count: int, repeat: int) -> float:
    from vllm_omni import DiffusionParams

    words = ("red", "blue", "green", "one", "two", "six", "eight", "nine")
    prompts = [WORDS[pipeline].format(word=f"{words[n % len(words)]} {repeat + 2}") for n in range(count)]
    stage = "image" if pipeline == IN_TURN else "token2wav"
    begin = time.perf_counter()
    outputs = omni.generate(prompts, {stage: DiffusionParams(seed=repeat + 2)})
    seconds = time.perf_counter() - begin
    assert all(output.error is None for output in outputs)
    return seconds
