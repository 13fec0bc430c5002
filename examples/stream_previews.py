"""A picture while it is made: how it looks so far and how far it is, then all of it as one row of pictures.

    python examples/stream_previews.py "a large pink star" --previews 4 -o row.png
    python examples/stream_previews.py "a lighthouse at dusk" --model path/to/Z-Image-Turbo

A preview shows what the picture would be if the rest of the way were straight. It costs a small part of a step, and
changes nothing: the last picture of the row is the same without it.
"""

from __future__ import annotations

import argparse

from PIL import Image

from vllm_omni import DiffusionParams, Omni

GAP = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="a red circle left of a blue square")
    parser.add_argument("--model", help="a ZImagePipeline folder or hub id (default: the model that ships)")
    parser.add_argument("--previews", type=int, default=4, help="how many, at most 10")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the config's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", default="previews.png")
    args = parser.parse_args()

    params = DiffusionParams(seed=args.seed, num_inference_steps=args.steps, num_previews=args.previews)
    pictures: list[Image.Image] = []
    with Omni(model=args.model) if args.model else Omni("tiny_image") as omni:
        for part in omni.stream(args.prompt, params):
            for stage, progress in part.progress.items():
                shown = "  preview" if part.previews else ""
                print(f"{stage}  {progress.step / progress.num_steps:4.0%}{shown}")
            pictures += part.images if part.finished else part.previews
    if part.error is not None:
        raise SystemExit(f"error: {part.error}")
    row(pictures).save(args.output)
    print(f"{args.output}: {len(pictures) - 1} previews and the picture of {args.prompt!r}")


def row(pictures: list[Image.Image]) -> Image.Image:
    """Pictures of one size side by side."""
    width, height = pictures[0].size
    sheet = Image.new("RGB", (len(pictures) * (width + GAP) - GAP, height), "white")
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index * (width + GAP), 0))
    return sheet


if __name__ == "__main__":
    main()
