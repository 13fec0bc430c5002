"""Judges the tiny sound model and the thinker through the package itself: plays held-out sounds and lets the detector
listen to every one, then gives held-out requests to tiny-omni and looks at its words, pictures and sounds.

    python -m tools.tiny.audio.evaluate --count 200
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tools.tiny.audio.judge import judge
from tools.tiny.audio.loose import KINDS, Asked, ask
from tools.tiny.audio.words import is_held_out, wording
from tools.tiny.audio.world import Sound, sample_sound
from tools.tiny.image.judge import complaint
from vllm_omni import DiffusionParams, Omni, OmniOutput

COLUMNS = ("notes", "timbre", "loudness", "speed", "all")


@dataclass(frozen=True)
class Case:
    """One kind of sound."""

    name: str
    accepts: Callable[[Sound], bool]


CASES = (
    Case("single note", lambda sound: not sound.is_chord and len(sound.notes) == 1),
    Case("two to four notes in a row", lambda sound: not sound.is_chord and len(sound.notes) > 1),
    Case("chord", lambda sound: sound.is_chord),
)


@dataclass(frozen=True, slots=True)
class Shares:
    """Of a case's recordings, the shares whose notes, timbre, loudness, speed and all of these are right."""

    notes: float
    timbre: float
    loudness: float
    speed: float
    all: float


def prompts_for(case: Case, count: int, seed: int) -> list[tuple[str, Sound]]:
    """Distinct wordings with their meaning, of sounds and in words that never occurred in training."""
    rng, found = random.Random(f"{seed} {case.name}"), dict[str, Sound]()
    while len(found) < count:
        sound = sample_sound(rng, held_out=True)
        if case.accepts(sound) and is_held_out(words := wording(sound, rng)):
            found[words] = sound
    return list(found.items())


def judge_case(
    omni: Omni, case: Case, count: int, seed: int, params: dict[str, object]
) -> tuple[Shares, list[str], list[OmniOutput]]:
    """(shares that are right, what was wrong, all outputs)."""
    prompts = prompts_for(case, count, seed)
    outputs = omni.generate([words for words, _ in prompts], seeded(count, seed, params))
    verdicts, wrong = [], []
    for (words, sound), output in zip(prompts, outputs, strict=True):
        verdict = judge(sound, samples_of(output))
        verdicts.append(verdict)
        if verdict.complaint:
            wrong.append(f"{words!r}: {verdict.complaint}")
    rights = [(v.notes_right, v.timbre_right, v.loudness_right, v.speed_right, v.is_right) for v in verdicts]
    return Shares(*(sum(column) / count for column in zip(*rights, strict=True))), wrong, outputs


def judge_requests(
    omni: Omni, kind: str, count: int, seed: int, params: dict[str, object]
) -> tuple[dict[str, float], list[str]]:
    """Held-out requests to tiny-omni: the shares whose words are exactly right, and whose picture and sound, where
    one was asked for, show and play what was meant. A picture or a sound that was not asked for makes the words wrong.
    """
    rng = random.Random(f"{seed} {kind}")
    asked = [ask(kind, rng, held_out=True) for _ in range(count)]
    outputs = omni.generate([one.words for one in asked], seeded(count, seed, params))
    rights: dict[str, list[bool]] = {}
    wrong = []
    for one, output in zip(asked, outputs, strict=True):
        faults = faults_of(one, output)
        for part, fault in faults.items():
            rights.setdefault(part, []).append(fault is None)
        wrong += [f"{one.words!r}: {part}: {fault}" for part, fault in faults.items() if fault]
    return {part: sum(right) / count for part, right in rights.items()}, wrong


def faults_of(asked: Asked, output: OmniOutput) -> dict[str, str | None]:
    """What is wrong with the words, and with the picture and the sound where one was asked for."""
    if output.error is not None:
        raise output.error
    faults: dict[str, str | None] = {"words": None if output.text == asked.answer else f"wrote {output.text!r}"}
    if (len(output.images), len(output.audios)) != (int(asked.scene is not None), int(asked.sound is not None)):
        faults["words"] = f"{len(output.images)} pictures and {len(output.audios)} sounds"
    if asked.scene:
        faults["picture"] = complaint(np.asarray(output.images[0]), asked.scene) if output.images else "none"
    if asked.sound:
        faults["sound"] = judge(asked.sound, samples_of(output)).complaint if output.audios else "none"
    return faults


def seeded(count: int, seed: int, params: dict[str, object]) -> Sequence[DiffusionParams]:
    return [DiffusionParams(seed=seed + index, **params) for index in range(count)]  # type: ignore[arg-type]


def samples_of(output: OmniOutput) -> np.ndarray:
    """[n] samples of the first channel."""
    if output.error is not None:
        raise output.error
    return output.audios[0].samples[0]


def show(lines: list[str]) -> None:
    for line in lines:
        print(f"  {line}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="prompts of each kind (default 200)")
    parser.add_argument("--requests", type=int, default=100, help="requests of each kind to tiny-omni (default 100)")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--steps", type=int, help="denoising steps (default: the configs')")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides of tiny_audio.yaml")
    parser.add_argument("--json", type=Path, help="where to put the figures")
    parser.add_argument("--sounds", type=Path, help="a folder for the first sounds of each kind")
    parser.add_argument("--verbose", action="store_true", help="print everything that is wrong")
    args = parser.parse_args()
    params: dict[str, object] = {} if args.steps is None else {"num_inference_steps": args.steps}
    figures: dict[str, object] = {"count": args.count, "requests": args.requests, "seed": args.seed, **params}
    figures["sounds"] = evaluate_sounds(args, params)
    figures["requests_right"] = evaluate_requests(args, params)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


def evaluate_sounds(args: argparse.Namespace, params: dict[str, object]) -> dict[str, dict[str, float]]:
    print(f"{'right of ' + str(args.count):28s}" + "".join(f"{name:>10s}" for name in COLUMNS))
    found = {}
    with Omni("tiny_audio.yaml", overrides=args.set) as omni:
        for case in CASES:
            shares, wrong, outputs = judge_case(omni, case, args.count, args.seed, params)
            found[case.name] = {name: round(share, 4) for name, share in asdict(shares).items()}
            print(f"{case.name:28s}" + "".join(f"{share:10.1%}" for share in found[case.name].values()))
            show(wrong if args.verbose else [])
            for index, output in enumerate(outputs[:4] if args.sounds else ()):
                args.sounds.mkdir(parents=True, exist_ok=True)
                output.audios[0].save(args.sounds / f"{case.name.split()[0]}-{index}.wav")
    return found


def evaluate_requests(args: argparse.Namespace, params: dict[str, object]) -> dict[str, dict[str, float]]:
    print(f"{'right of ' + str(args.requests):28s}" + "".join(f"{name:>10s}" for name in ("words", "picture", "sound")))
    found = {}
    with Omni("tiny_omni.yaml") as omni:
        for kind in KINDS:
            shares, wrong = judge_requests(omni, kind, args.requests, args.seed, params)
            found[kind] = {part: round(share, 4) for part, share in shares.items()}
            cells = (f"{shares[part]:10.1%}" if part in shares else " " * 10 for part in ("words", "picture", "sound"))
            print(f"{kind:28s}" + "".join(cells))
            show(wrong if args.verbose else [])
    return found


if __name__ == "__main__":
    main()
