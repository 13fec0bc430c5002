"""Step caches on the shipped sound model: sounds per second and the share judged right, against fewer steps without.

The detector of tools/tiny/audio is the judge.
"""

from __future__ import annotations

from typing import Any

from benchmarks.limits import Limits
from benchmarks.measure import Options, Report, Table
from benchmarks.sides import SideProcess
from benchmarks.step_caches import COLUMNS, JudgedModel, Subject, cells, grid, in_turn, measure

STEPS = (1, 2, 4, 8, 16, 24)
CACHED_STEPS = (8, 24)


def prompts(count: int) -> list[tuple[str, Any]]:
    from tools.tiny.audio.evaluate import CASES, prompts_for

    return in_turn([prompts_for(case, -(-count // len(CASES)), seed=1000) for case in CASES], count)


def is_right(output: Any, sound: Any) -> bool:
    from tools.tiny.audio.evaluate import samples_of
    from tools.tiny.audio.judge import judge

    return judge(sound, samples_of(output)).is_right


SUBJECT = Subject("tiny_audio.yaml", "sound", "C4", prompts, is_right)


def run(options: Options, limits: Limits | None = None) -> Report:
    count, part = (2, 2) if options.is_quick else (48, 16)
    variants = grid(options, STEPS, CACHED_STEPS)
    with SideProcess("vllm_omni", options.threads, JudgedModel, SUBJECT, count) as us:
        measure(us, variants, count, part)
    columns = ("variant", "sounds/s", *COLUMNS)
    return Report(
        "audio_cache",
        [Table(f"Step caches, {count} sounds of two seconds each", columns, [cells(v, variants) for v in variants])],
        notes=[
            "Judged by the detector of tools/tiny/audio: notes, timbre, loudness and speed; single notes, rows, chords."
        ],
        figures={"variants": [variant.figures() for variant in variants]},
    )
