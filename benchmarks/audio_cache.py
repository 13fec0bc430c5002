"""Step caches on the shipped sound model: the blocks that they compute, the distance of their latents and the share
judged right, against fewer steps without one.

The detector of tools/tiny/audio is the judge.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.limits import Limits
from benchmarks.measure import ROOT, Options, Report
from benchmarks.step_caches import Subject, in_turn, run_subject

PICTURE = ROOT / "benchmarks" / "results" / "audio_cache.png"
STEPS, FEWER_STEPS = 24, (2, 4, 6, 8, 12, 16, 20)
FITTED_ON = ("C4", "E4 then G4, square, fast", "A4 and C5 together, sine, soft", "C4 then E4 then G4")


def prompts(count: int) -> list[tuple[str, Any]]:
    from tools.tiny.audio.evaluate import CASES, prompts_for

    return in_turn([prompts_for(case, -(-count // len(CASES)), seed=1000) for case in CASES], count)


def is_right(output: Any, sound: Any) -> bool:
    from tools.tiny.audio.evaluate import samples_of
    from tools.tiny.audio.judge import judge

    return judge(sound, samples_of(output)).is_right


SUBJECT = Subject("audio_cache", "tiny_audio", "sound", STEPS, FEWER_STEPS, 6, FITTED_ON, prompts, is_right)
JUDGE = "Judged by the detector of tools/tiny/audio: notes, timbre, loudness and speed; single notes, rows, chords."


def run(options: Options, limits: Limits | None = None) -> Report:
    found = run_subject(SUBJECT, options, 3 if options.is_quick else 12, PICTURE)
    return dataclasses.replace(found, notes=[*found.notes, JUDGE])
