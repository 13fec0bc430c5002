"""A video of words, and of a picture where the model takes one: by Wan, or by any video pipeline of diffusers. Shows
every step.

python examples/video.py "waves at night" --model path/to/Wan2.2-TI2V-5B-Diffusers --num-frames 49 -o waves.mp4
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_omni import DiffusionParams, Omni


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--model", required=True, help="a folder in diffusers' format, or a hub id")
    parser.add_argument("--image", type=Path, help="the first frame, of pipelines that go from image to video")
    parser.add_argument("--num-frames", type=int)
    parser.add_argument("--fps", type=float, help="frames per second")
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("out.mp4"), help="a .mp4, .webm, .gif or .webp file")
    args = parser.parse_args()

    params = DiffusionParams(
        seed=args.seed,
        num_frames=args.num_frames,
        fps=args.fps,
        height=args.height,
        width=args.width,
        num_inference_steps=args.steps,
    )
    prompt = {"prompt": args.prompt, **({"image": args.image} if args.image else {})}
    with Omni(model=args.model, progress=False) as omni:
        for part in omni.stream(prompt, params):
            for stage, at in part.progress.items():
                print(f"{stage}: step {at.step} of {at.num_steps}")
    if part.error is not None:
        raise SystemExit(f"error: {part.error}")
    video = part.videos[0]
    video.save(args.output)
    video.frame(0).save(args.output.with_suffix(".png"))
    print(f"{args.output}: {video}")


if __name__ == "__main__":
    main()
