"""Trains the tiny speaking model from nothing to the folder that ships, in one seeded, resumable command.

    python -m tools.tiny.speech.train      # needs espeak-ng; see tools/tiny/speech/README.md for the time of each part

Parts that are done are left alone; a part that was interrupted goes on from its checkpoint. Start over by removing
the folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tools.tiny.speech import train_codes, train_dit, train_talker, train_thinker, train_vocoder
from tools.tiny.speech.assemble import assemble

PARTS = {
    "train_thinker": train_thinker.main,
    "train_codes": train_codes.main,
    "train_talker": train_talker.main,
    "train_dit": train_dit.main,
    "train_vocoder": train_vocoder.main,
}
QUICK = {
    "train_thinker": ["--steps", "2", "--batch-size", "4", "--judged", "4"],
    "train_codes": ["--recordings", "24"],
    "train_talker": ["--steps", "2", "--batch-size", "4", "--sentences", "8", "--judged", "1"],
    "train_vocoder": ["--steps", "2", "--recordings", "2", "--batch-size", "2"],
    "train_dit": ["--steps", "2", "--recordings", "4", "--batch-size", "2", "--judged", "1"],
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/tiny-speech"))
    parser.add_argument("--asset", type=Path, default=Path("vllm_omni/assets/tiny-speech"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs")
    args = parser.parse_args(arguments)
    codebook = ["--codebook", args.runs / "codebook.safetensors"]
    given = {
        "train_thinker": ["--folder", args.runs / "thinker"],
        "train_codes": ["--folder", args.runs],
        "train_talker": ["--folder", args.runs / "talker", "--thinker", args.runs / "thinker", *codebook],
        "train_dit": ["--folder", args.runs / "dit", *codebook],
        "train_vocoder": ["--folder", args.runs / "vocoder", "--dit", args.runs / "dit", *codebook],
    }
    for name, part in PARTS.items():
        part([*map(str, given[name]), "--seed", str(args.seed), *(QUICK[name] if args.quick else ())])
    assemble(args.runs, args.asset)


if __name__ == "__main__":
    main()
