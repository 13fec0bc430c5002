"""Text to speech with the small model that ships: it says one to five words it knows, and is heard while it speaks.

python examples/tiny_talker.py "three seven red" -o speech.wav
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from vllm_omni import Omni


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", default="3 7 red")
    parser.add_argument("-o", "--output", type=Path, default=Path("out.wav"), help="a .wav, .flac or .ogg file")
    args = parser.parse_args()

    with Omni("tiny_talker") as omni:
        begin, first_s = time.perf_counter(), None
        for output in omni.stream(args.text):
            if output.audios and first_s is None:
                first_s = time.perf_counter() - begin
        done_s = time.perf_counter() - begin
    if output.error is not None:
        raise SystemExit(f"error: {output.error}")
    speech = output.audios[0]
    speech.save(args.output)
    print(f"spoke   {args.output}: {speech.duration_s:.2f} s at {speech.sample_rate} Hz")
    print(f"took    {done_s:.2f} s, the first sound after {first_s:.2f} s")


if __name__ == "__main__":
    main()
