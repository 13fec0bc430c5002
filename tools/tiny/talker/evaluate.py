"""Judges the small speaking model through the package, and tiny-speech beside it: the words that are heard in held-out
sentences, and how near the speech is to what espeak-ng says.

    python -m tools.tiny.talker.evaluate runs/tiny-talker/tiny-talker --data runs/tiny-talker/data.safetensors
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tools.tiny.speech.evaluate import held_out, share
from tools.tiny.speech.judge import Verdict, judge, pieces
from tools.tiny.speech.synthesise import speak
from tools.tiny.speech.world import Sentence
from tools.tiny.talker.likeness import Likeness, likeness
from tools.tiny.talker.spoken import Spoken
from vllm_omni import DiffusionParams, Omni, SamplingParams

BATCH = 8  # requests at a time
NO_SOUND = Likeness(1.0, 12.0, 8.0)


@dataclass(frozen=True, slots=True)
class Judged:
    """One sentence: what was heard, and how near it is to the recording, word by word."""

    verdict: Verdict
    likeness: Likeness


def judged(said: Sequence[tuple[Sentence, Tensor]], recorded: Callable[[Sentence], Tensor]) -> list[Judged]:
    """said: sentences and their speech, [n] float32 at 24 kHz."""
    return [Judged(judge(words, sound), nearness(sound, recorded(words))) for words, sound in said]


def nearness(speech: Tensor, recording: Tensor) -> Likeness:
    """Of the stretches between pauses, each with its like, since pauses may be longer in one of them."""
    ours, theirs = (pieces(sound.numpy()) for sound in (speech, recording))
    if len(ours) != len(theirs):
        return NO_SOUND
    found = [likeness(*map(torch.tensor, pair)) for pair in zip(ours, theirs, strict=True)]
    return Likeness(*(mean([getattr(one, name) for one in found]) for name in Likeness.__slots__))


def figures(found: Sequence[Judged]) -> dict[str, float]:
    rights = [one.verdict.right for one in found]
    nearnesses = {name: mean([getattr(one.likeness, name) for one in found]) for name in Likeness.__slots__}
    return {
        "sentences": len(found),
        "words": sum(map(len, rights)),
        "words_heard_right": share([word for right in rights for word in right]),
        "sentences_heard_right": share([all(right) for right in rights]),
        **{f"{name}_off": round(value, 4) for name, value in nearnesses.items()},
    }


def mean(values: Sequence[float]) -> float:
    numbers = [value for value in values if value == value]  # a word without voiced frames has no pitch
    return sum(numbers) / max(1, len(numbers))


def speech(config: str, model: str | None, asked: Sequence[tuple[Sentence, str]]) -> list[tuple[Sentence, Tensor]]:
    """What a pipeline says when it is asked so."""
    params = DiffusionParams(seed=0) if config == "tiny_speech.yaml" else SamplingParams()
    found: list[tuple[Sentence, Tensor]] = []
    with Omni(config, model=model) as omni:
        for start in range(0, len(asked), BATCH):
            part = asked[start : start + BATCH]
            for (words, _), output in zip(part, omni.generate([text for _, text in part], params), strict=True):
                if output.error is not None:
                    raise output.error
                found.append((words, torch.as_tensor(output.audios[0].samples[0])))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--count", type=int, default=100, help="sentences (default 100)")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--beside", action="store_true", help="tiny-speech, too")
    parser.add_argument("--json", type=Path, help="where to put the figures")
    args = parser.parse_args()
    asked, spoken = held_out(args.count, args.seed), Spoken.load(args.data)
    plainly = [(words, " ".join(words)) for words, _ in asked]
    found = {"tiny-talker": judged(speech("qwen3_tts.yaml", str(args.model), plainly), spoken.sound)}
    if args.beside:
        said = speech("tiny_speech.yaml", None, asked)
        found["tiny-speech"] = judged(said, lambda words: torch.from_numpy(speak(words)))
    for name, ones in found.items():
        for complaint in filter(None, (one.verdict.complaint for one in ones)):
            print(f"  {name}: {complaint}")
    result = {"seed": args.seed, **{name: figures(ones) for name, ones in found.items()}}
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
