"""Text to audio with the model that ships: notes, chords, four timbres. Saves the sound and a picture of it.

python examples/text_to_audio.py "C4 then E4 then G4, square, fast" -o melody.wav
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_omni import DiffusionParams, Omni


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="a soft chord of A3 and E4 on a plucked string")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("out.wav"), help="a .wav, .flac or .ogg file")
    args = parser.parse_args()

    with Omni("tiny_audio") as omni:
        output = omni.generate(args.prompt, DiffusionParams(seed=args.seed))[0]
    if output.error is not None:
        raise SystemExit(f"error: {output.error}")
    audio = output.audios[0]
    audio.save(args.output)
    audio.plot(args.output.with_suffix(".png"))
    print(f"{args.output}: {audio.duration_s:g} s at {audio.sample_rate} Hz, samples {audio.samples.shape}")
    print(f"{args.output.with_suffix('.png')}: waveform and mel spectrogram")


if __name__ == "__main__":
    main()
