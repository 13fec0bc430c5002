"""Trains the tiny image model from nothing to the folder that ships, in one seeded, resumable command.

    python -m tools.tiny.train            # two cores: see benchmarks/results/ for the wall time of each part

Parts that are done are left alone; a part that was interrupted goes on from its checkpoint. Start over by removing
the folder.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from tools.tiny.assemble import assemble

PARTS = ("train_text", "train_vae", "train_image")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/tiny-image"))
    parser.add_argument("--asset", type=Path, default=Path("vllm_omni/assets/tiny-image"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folders = {"train_text": args.runs / "text", "train_vae": args.runs / "vae", "train_image": args.runs}
    for part in PARTS:
        command = [sys.executable, "-m", f"tools.tiny.{part}", "--folder", str(folders[part]), "--seed", str(args.seed)]
        subprocess.run(command, check=True)
    assemble(args.runs, args.asset)


if __name__ == "__main__":
    main()
