"""A picture that is stopped half way, and goes on later: the file beside it holds all that is needed, on any day.

    python examples/resume.py "a large pink star" -o star.png          # stops half way: star.safetensors
    python examples/resume.py -o star.png                              # goes on with it: star.png

It is, to the bit, the picture that it would have been.
"""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path

from vllm_omni import DiffusionParams, Omni


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", help="begins this picture; without one, goes on with what was begun")
    parser.add_argument("--model", help="a ZImagePipeline folder or hub id (default: the model that ships)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the config's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", default="picture.png")
    args = parser.parse_args()

    state = Path(args.output).with_suffix(".safetensors")
    with Omni(model=args.model) if args.model else Omni("tiny_image") as omni:
        if args.prompt is not None:
            begin(omni, args.prompt, DiffusionParams(seed=args.seed, num_inference_steps=args.steps), state)
            return
        output = omni.resume(state)
    if output.error is not None:
        raise SystemExit(f"error: {output.error}")
    output.images[0].save(args.output)
    counts = output.metrics["image"]
    print(f"{args.output}: {counts['steps'] - counts['resumed_steps']} of {counts['steps']} steps were left")


def begin(omni: Omni, prompt: str, params: DiffusionParams, state: Path) -> None:
    """Leaving the stream aborts the request; its state is in the file then."""
    with closing(omni.stream(prompt, params)) as parts:
        for part in parts:
            progress = part.progress.get("image")
            if progress is not None and 2 * progress.step >= progress.num_steps:
                omni.save_state(part.request_id, state)
                print(f"{state}: stopped after {progress.step} of {progress.num_steps} steps of {prompt!r}")
                return
    raise SystemExit(f"error: {part.error or 'it was done before it could be stopped; ask for more steps'}")


if __name__ == "__main__":
    main()
