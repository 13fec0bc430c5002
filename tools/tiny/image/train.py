"""Trains the tiny image model from nothing to the folder that ships, in one seeded, resumable command.

    python -m tools.tiny.image.train            # two cores: see benchmarks/results/ for the wall time of each part

Parts that are done are left alone; a part that was interrupted goes on from its checkpoint. Start over by removing
the folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tools.tiny.image import train_image, train_text, train_vae
from tools.tiny.image.assemble import assemble

PARTS = {"train_text": train_text.main, "train_vae": train_vae.main, "train_image": train_image.main}
QUICK = {
    "train_text": ["--steps", "2", "--batch-size", "4", "--judged", "1", "--examples", "4000"],
    "train_vae": ["--steps", "2", "--pictures", "32"],
    "train_image": ["--steps", "2", "--pictures", "64", "--batch-size", "4"],
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/tiny-image"))
    parser.add_argument("--asset", type=Path, default=Path("vllm_omni/assets/tiny-image"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs")
    args = parser.parse_args(arguments)
    folders = {"train_text": args.runs / "text", "train_vae": args.runs / "vae", "train_image": args.runs}
    for name, part in PARTS.items():
        given = ["--folder", str(folders[name]), "--seed", str(args.seed)]
        part([*given, *(QUICK[name] if args.quick else ())])
    assemble(args.runs, args.asset, num_pictures=10 if args.quick else 200)


if __name__ == "__main__":
    main()
