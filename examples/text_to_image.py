"""Text to image: the prompt is encoded by a Qwen3, whose hidden states condition a diffusion transformer.

python examples/text_to_image.py "a large pink star" -o star.png --seed 7
python examples/text_to_image.py "a lighthouse at dusk" --model path/to/Z-Image-Turbo --size 1024
"""

from __future__ import annotations

import argparse

from vllm_omni import DiffusionParams, Omni


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="a red circle left of a blue square")
    parser.add_argument("--model", help="a ZImagePipeline folder or hub id (default: the model that ships)")
    parser.add_argument("--size", type=int, help="height and width in pixels (default: the model's own)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the config's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", default="out.png")
    args = parser.parse_args()

    params = DiffusionParams(seed=args.seed, height=args.size, width=args.size, num_inference_steps=args.steps)
    with Omni(model=args.model) if args.model else Omni("tiny_image") as omni:
        output = omni.generate(args.prompt, params)[0]
    if output.error is not None:
        raise SystemExit(f"error: {output.error}")
    output.images[0].save(args.output)
    print(f"{args.output}: {output.images[0].width} x {output.images[0].height} pixels of {args.prompt!r}")


if __name__ == "__main__":
    main()
