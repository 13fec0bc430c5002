"""One prompt, up to three answers: a Qwen3 thinks, and what it asks for is drawn and played side by side. A branch
that it does not ask for never runs.

    python examples/picture_and_sound.py "show me a scarlet ball and play a C4 on a string" -o out/
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_omni import DiffusionParams, Omni

PROMPTS = [
    "show me a scarlet ball and play a C4 on a string",
    "please play c4 then e4 then g4 quickly",
    "paint a navy box to the left of a golden hoop",
    "hello",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="*", default=PROMPTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("out"), help="a folder")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    with Omni("tiny_omni") as omni:
        outputs = omni.generate(args.prompts, DiffusionParams(seed=args.seed))
    for number, (prompt, output) in enumerate(zip(args.prompts, outputs, strict=True)):
        if output.error is not None:
            raise SystemExit(f"error: {output.error}")
        print(f"asked   {prompt}")
        for line in (output.text or "").splitlines():
            print(f"wrote   {line}")
        for image in output.images:
            image.save(args.output / f"{number}.png")
            print(f"drawn   {args.output / f'{number}.png'}")
        for audio in output.audios:
            audio.save(args.output / f"{number}.wav")
            print(f"played  {args.output / f'{number}.wav'} ({audio.duration_s:g} s)")
        skipped = [stage for stage, did in output.metrics.items() if did.get("skipped")]
        print(f"skipped {', '.join(skipped) or 'nothing'}\n")


if __name__ == "__main__":
    main()
