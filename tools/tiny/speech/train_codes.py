"""Fits the codes to recordings of training sentences: see `tools.tiny.speech.codes`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tools.tiny.speech.codes import NUM_CODES, Codebook
from tools.tiny.speech.recordings import recordings


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/tiny-speech"))
    parser.add_argument("--recordings", type=int, default=800)
    parser.add_argument("--codes", type=int, default=NUM_CODES)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    path = args.folder / "codebook.safetensors"
    if path.exists():
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    codebook = Codebook.fit([one.mel for one in recordings(args.recordings, args.seed)], args.codes, args.seed)
    held = [one.mel[: len(one.mel) // 2 * 2] for one in recordings(50, args.seed, held_out=True)]
    errors = [(codebook.decode(codebook.encode(mel)) - mel)[mel.amax(dim=1) > -2].abs().mean() for mel in held]
    print(f"{codebook.num_codes} codes; held-out spectrograms differ by {float(sum(errors)) / len(errors):.3f}")
    codebook.save(path)


if __name__ == "__main__":
    main()
