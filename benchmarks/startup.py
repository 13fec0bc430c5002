"""From nothing to a picture: imports, loading, the whole command, and where its time goes; diffusers for comparison.
From nothing to a server that is ready.

Every run is a fresh process. The files are in the operating system's cache after the first, untimed one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.limits import Limits
from benchmarks.measure import ROOT, Options, Report, Table, median, with_spread
from benchmarks.server_startup import server_figures, server_starts, server_table

PROMPT = "a red circle left of a blue square"
PEER = """\
import torch
from diffusers import ZImagePipeline
from vllm_omni.utils.files import resolve_model_folder
pipeline = ZImagePipeline.from_pretrained(resolve_model_folder("asset://tiny-image")).to(torch.float32)
pipeline.set_progress_bar_config(disable=True)
pipeline({prompt!r}, height=128, width=128, num_inference_steps=9, guidance_scale=0.0).images[0].save({file!r})
"""
PHASES = """\
import json, time
clock, marks = time.perf_counter, [("", time.perf_counter())]
from vllm_omni import DiffusionParams, Omni
marks.append(("import Omni", clock()))
omni = Omni("tiny_image.yaml", device="cpu", progress=False)
marks.append(("load the model", clock()))
for name in ("first picture", "second picture"):
    omni.generate({prompt!r} + name, DiffusionParams(seed=1))
    marks.append((name, clock()))
print(json.dumps({{name: end - start for (_, start), (name, end) in zip(marks, marks[1:])}}))
"""
TOP = 12


def run(options: Options, limits: Limits | None = None) -> Report:
    with tempfile.TemporaryDirectory() as temporary:
        file = str(Path(temporary) / "picture.png")
        generate = ["-m", "vllm_omni", "generate", PROMPT, "-q", "-o", file]
        commands = {
            "python, nothing imported": ["-c", "pass"],
            "import vllm_omni": ["-c", "import vllm_omni"],
            "vllm-omni --help": ["-m", "vllm_omni", "--help"],
            "vllm-omni generate, to a picture": generate,
            "diffusers, to a picture": ["-c", PEER.format(prompt=PROMPT, file=file)],
        }
        seconds = in_turn(commands, options)
        phases = [json.loads(python(["-c", PHASES.format(prompt=PROMPT)], options)[1]) for _ in repeats(options)]
        packages = import_seconds(python(["-X", "importtime", *generate], options)[2])
    servers = server_starts(options)
    ratios = [
        peer / us
        for us, peer in zip(
            seconds["vllm-omni generate, to a picture"], seconds["diffusers, to a picture"], strict=True
        )
    ]
    imported = [[name, f"{spent:.2f}"] for name, spent in packages.items()]
    return Report(
        "startup",
        [
            Table(
                "Whole processes, s", ("command", "wall time"), [[name, with_spread(s)] for name, s in seconds.items()]
            ),
            Table(
                "Inside one process, s",
                ("phase", "wall time"),
                [[name, with_spread([phase[name] for phase in phases])] for name in phases[0]],
            ),
            Table("Imports of `generate` by package, own time, s", ("package", "own time"), imported),
            server_table(servers),
        ],
        notes=[f"Command to picture: {with_spread(ratios)} times as fast as diffusers."],
        figures={
            "seconds": seconds,
            "phases": phases,
            "imports_s": packages,
            "servers": server_figures(servers),
            "ratio": median(ratios),
        },
    )


def in_turn(commands: dict[str, list[str]], options: Options) -> dict[str, list[float]]:
    """Wall times of every command, one of each after the other, the first round untimed."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for index in [-1, *repeats(options)]:
        for name, arguments in commands.items():
            spent = python(arguments, options)[0]
            if index >= 0:
                seconds[name].append(spent)
    return seconds


def repeats(options: Options) -> range:
    return range(1 if options.is_quick else options.repeats)


def python(arguments: Sequence[str], options: Options) -> tuple[float, str, str]:
    """(wall seconds, stdout, stderr) of a fresh interpreter in the repository."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    spent = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)[:80]} exited {done.returncode}:\n{done.stderr[-2000:]}")
    return spent, done.stdout, done.stderr


def import_seconds(importtime: str) -> dict[str, float]:
    """Own import time of the slowest top-level packages, from the lines `import time: own us | cumulated us | name`."""
    found: dict[str, float] = defaultdict(float)
    for line in importtime.splitlines():
        cells: Any = line.removeprefix("import time:").split("|")
        if len(cells) == 3 and cells[0].strip().isdigit():
            package = cells[2].strip().split(".")[0]
            found["standard library" if package in sys.stdlib_module_names else package] += int(cells[0]) / 1e6
    return dict(sorted(found.items(), key=lambda item: -item[1])[:TOP])
