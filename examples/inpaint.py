"""Inpainting: of a picture, what a mask shows white (or transparent) is drawn anew, the rest is kept.

python examples/inpaint.py "a red circle left of a green triangle" --image picture.png --mask mask.png

Without them, it draws a picture and masks its right half.
"""

from __future__ import annotations

import argparse

from PIL import Image

from vllm_omni import DiffusionParams, Omni


def right_half(image: Image.Image) -> Image.Image:
    """A mask of the picture's size."""
    mask = Image.new("L", image.size, 0)
    mask.paste(255, (image.width // 2, 0, image.width, image.height))
    return mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="a red circle left of a green triangle")
    parser.add_argument("--image", help="(default: 'a red circle left of a blue square', drawn first)")
    parser.add_argument("--mask", help="of the same size (default: the right half)")
    parser.add_argument("--model", help="a folder or hub id of a model that takes masks (default: the one that ships)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", default="inpainted.png")
    args = parser.parse_args()
    if args.image and not args.mask:
        raise SystemExit("error: --image: give --mask too, which says what of it is drawn anew")

    with Omni(model=args.model) if args.model else Omni("tiny_image") as omni:
        before = "a red circle left of a blue square"
        image = args.image or omni.generate(before, DiffusionParams(seed=args.seed))[0].images[0]
        mask = args.mask or right_half(image)
        output = omni.generate(args.prompt, DiffusionParams(image=image, mask=mask, seed=args.seed))[0]
    if output.error is not None:
        raise SystemExit(f"error: {output.error}")
    output.images[0].save(args.output)
    print(f"{args.output}: {args.prompt!r}")


if __name__ == "__main__":
    main()
