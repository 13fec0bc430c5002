"""Judges the tiny speaking model through the package itself: asks for held-out sentences in loose words, looks at
what it writes, and listens to what it says.

    python -m tools.tiny.speech.evaluate --count 100
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.tiny.speech.judge import Verdict, judge
from tools.tiny.speech.requests import answer, request
from tools.tiny.speech.world import MAX_WORDS, Sentence, sentence
from vllm_omni import DiffusionParams, Omni, OmniOutput

BATCH = 8  # requests at a time


@dataclass(frozen=True, slots=True)
class Judged:
    """One request: what was written, and what was heard."""

    asked: str
    written: str
    verdict: Verdict

    @property
    def is_written(self) -> bool:
        return self.written == answer(self.verdict.meant)


def held_out(count: int, seed: int) -> list[tuple[Sentence, str]]:
    """Distinct sentences that never occurred in training, and requests for them."""
    rng, found = random.Random(seed), dict[Sentence, str]()
    while len(found) < count:
        words = sentence(rng, held_out=True)
        found[words] = request(words, rng)
    return list(found.items())


def judged(omni: Omni, asked: Sequence[tuple[Sentence, str]], seed: int, sounds: Path | None = None) -> list[Judged]:
    """sounds: a folder for what is said."""
    found: list[Judged] = []
    for start in range(0, len(asked), BATCH):
        part = asked[start : start + BATCH]
        params = [DiffusionParams(seed=seed + start + number) for number in range(len(part))]
        outputs = omni.generate([words for _, words in part], params)
        for (words, text), output in zip(part, outputs, strict=True):
            found.append(Judged(text, written(output), judge(words, output.audios[0].samples[0])))
            if sounds is not None:
                sounds.mkdir(parents=True, exist_ok=True)
                output.audios[0].save(sounds / f"{'_'.join(words)}.wav")
    return found


def written(output: OmniOutput) -> str:
    if output.error is not None:
        raise output.error
    return output.text or ""


def figures(found: Sequence[Judged]) -> dict[str, object]:
    """Shares: of requests written right, of words heard right, of sentences all of whose words are, by their length."""
    rights = [one.verdict.right for one in found]
    lengths = {length: [all(right) for right in rights if len(right) == length] for length in range(1, MAX_WORDS + 1)}
    return {
        "sentences": len(found),
        "words": sum(map(len, rights)),
        "written_right": share([one.is_written for one in found]),
        "words_heard_right": share([word for right in rights for word in right]),
        "sentences_heard_right": share([all(right) for right in rights]),
        "by_number_of_words": {str(length): share(right) for length, right in lengths.items() if right},
    }


def share(rights: Sequence[bool]) -> float:
    return round(sum(rights) / len(rights), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="requests (default 100)")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--model", help="a folder instead of the one that ships")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides of tiny_speech.yaml")
    parser.add_argument("--json", type=Path, help="where to put the figures")
    parser.add_argument("--sounds", type=Path, help="a folder for what is said")
    args = parser.parse_args()
    with Omni("tiny_speech.yaml", model=args.model, overrides=args.set) as omni:
        found = judged(omni, held_out(args.count, args.seed), args.seed, args.sounds)
    for one in found:
        wrong = None if one.is_written else f"wrote {one.written!r}"
        if complaint := wrong or one.verdict.complaint:
            print(f"  {one.asked!r}: {complaint}")
    result = {"seed": args.seed, **figures(found)}
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
