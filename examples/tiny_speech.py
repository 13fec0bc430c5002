"""Text to speech with the model that ships: it reads out one to five words it knows.

python examples/tiny_speech.py "please say three seven red" -o reply.wav
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_omni import DiffusionParams, Omni


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="can you read out: 3 7 red?")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("out.wav"), help="a .wav, .flac or .ogg file")
    args = parser.parse_args()

    with Omni("tiny_speech") as omni:
        output = omni.generate(args.prompt, DiffusionParams(seed=args.seed))[0]
    if output.error is not None:
        raise SystemExit(f"error: {output.error}")
    speech = output.audios[0]
    speech.save(args.output)
    print(f"wrote   {output.text}")
    print(f"spoke   {args.output}: {speech.duration_s:.2f} s at {speech.sample_rate} Hz")


if __name__ == "__main__":
    main()
