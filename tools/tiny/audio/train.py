"""Trains the tiny sound model from nothing to the folder that ships, in one seeded, resumable command.

    python -m tools.tiny.audio.train      # two cores: see tools/tiny/image/README.md for the wall time of each part

Parts that are done are left alone; a part that was interrupted goes on from its checkpoint. Start over by removing
the folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tools.tiny.audio import generated, train_audio, train_decoder, train_text, train_vae
from tools.tiny.audio.assemble import assemble

PARTS = {
    "train_text": train_text.main,
    "train_vae": train_vae.main,
    "train_audio": train_audio.main,
    "generated": generated.main,
    "train_decoder": train_decoder.main,
}
QUICK = {
    "train_text": ["--steps", "2", "--batch-size", "4", "--judged", "1", "--examples", "4000"],
    "train_vae": ["--steps", "2", "--recordings", "4", "--batch-size", "2"],
    "train_audio": ["--steps", "2", "--sounds", "8", "--batch-size", "4"],
    "generated": ["--sounds", "8"],
    "train_decoder": ["--steps", "2", "--sounds", "8", "--batch-size", "2"],
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/tiny-audio"))
    parser.add_argument("--asset", type=Path, default=Path("vllm_omni/assets/tiny-audio"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs")
    args = parser.parse_args(arguments)
    vae, data, made = args.runs / "vae/vae", args.runs / "data.safetensors", args.runs / "generated.safetensors"
    given = {
        "train_text": ["--folder", args.runs / "text"],
        "train_vae": ["--folder", args.runs / "vae"],
        "train_audio": ["--folder", args.runs],
        "generated": ["--folder", args.runs],
        "train_decoder": [*("--folder", args.runs / "decoder", "--vae", vae, "--data", data, "--generated", made)],
    }
    for name, part in PARTS.items():
        part([*map(str, given[name]), "--seed", str(args.seed), *(QUICK[name] if args.quick else ())])
    assemble(args.runs, args.asset)


if __name__ == "__main__":
    main()
