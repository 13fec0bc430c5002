"""Image to image: a picture is the start of another one, which keeps of it what `--strength` lets it keep.

python examples/edit_image.py "a blue circle" --image red_circle.png --strength 0.6
python examples/edit_image.py "a lighthouse in the snow" --image lighthouse.jpg --model path/to/Z-Image-Turbo

Without `--image`, it draws the one to start from itself.
"""

from __future__ import annotations

import argparse

from vllm_omni import DiffusionParams, Omni


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="a blue circle")
    parser.add_argument("--image", help="the picture to start from (default: 'a red circle', drawn first)")
    parser.add_argument("--strength", type=float, default=0.7, help="how far it may be left, 0 to 1")
    parser.add_argument("--model", help="a folder or hub id of a model that takes images (default: the one that ships)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", default="edited.png")
    args = parser.parse_args()

    with Omni(model=args.model) if args.model else Omni("tiny_image") as omni:
        image = args.image or omni.generate("a red circle", DiffusionParams(seed=args.seed))[0].images[0]
        params = DiffusionParams(image=image, strength=args.strength, seed=args.seed)
        output = omni.generate(args.prompt, params)[0]
    if output.error is not None:
        raise SystemExit(f"error: {output.error}")
    output.images[0].save(args.output)
    print(f"{args.output}: {args.prompt!r}, strength {args.strength:g}")


if __name__ == "__main__":
    main()
