"""Loose words to a picture, in two stages: a Qwen3 writes the scene in plain words, token by token, and the hidden
states of what it wrote condition a diffusion transformer. Partial outputs are shown as they come.

    python examples/loose_words_to_image.py "please paint a crimson ball to the left of a navy box" -o out.png
"""

from __future__ import annotations

import argparse

from vllm_omni import DiffusionParams, Omni, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="could you draw me a scarlet disc on top of an emerald block")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", default="out.png")
    args = parser.parse_args()

    params = {"writer": SamplingParams(temperature=0.0), "image": DiffusionParams(seed=args.seed)}
    print(f"asked   {args.prompt}")
    with Omni("tiny_scene") as omni:
        for part in omni.stream(args.prompt, params):
            if part.finished:
                break
            for stage, progress in part.metrics.items():
                print(f"{stage:7} step {progress['step']} of at most {progress['num_steps']}  {part.text or ''}")
    if part.error is not None:
        raise SystemExit(f"error: {part.error}")
    part.images[0].save(args.output)
    print(f"wrote   {part.text}\ndrawn   {args.output}")


if __name__ == "__main__":
    main()
