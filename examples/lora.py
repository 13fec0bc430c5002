"""LoRA per request: one prompt and one seed without an adapter, with half of it and with all of it, in one batch.

python examples/lora.py "a red circle left of a blue square" -o row.png
python examples/lora.py "a lighthouse" --lora loras/film.safetensors --model path/to/Z-Image-Turbo

Without `--lora` it writes a file of random numbers, which shows how one is laid out; what that draws is nothing to
look for.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from vllm_omni import DiffusionParams, LoRA, Omni
from vllm_omni.utils.files import resolve_model_folder

RANK, SPREAD = 4, 0.25
SCALES = (0.0, 0.5, 1.0)
ADAPTED = ("attention.to_q.weight", "attention.to_v.weight", "feed_forward.w2.weight")


def write_random_lora(path: Path) -> None:
    """Two thin matrices for some projections of every block: their product is added to the weight's."""
    weights = resolve_model_folder("asset://tiny-image/transformer") / "diffusion_pytorch_model.safetensors"
    draw, tensors = torch.Generator().manual_seed(0), {}
    with safe_open(str(weights), framework="pt") as file:
        for name in sorted(file.keys()):
            if name.startswith("layers.") and name.endswith(ADAPTED):
                outputs, inputs = file.get_slice(name).get_shape()
                layer = f"transformer.{name.removesuffix('.weight')}"
                tensors[f"{layer}.lora_A.weight"] = torch.randn(RANK, inputs, generator=draw) * SPREAD
                tensors[f"{layer}.lora_B.weight"] = torch.randn(outputs, RANK, generator=draw) * SPREAD
    save_file(tensors, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="a red circle left of a blue square")
    parser.add_argument("--lora", help="a .safetensors file (default: a random one for the model that ships)")
    parser.add_argument("--model", help="a ZImagePipeline folder or hub id (default: the model that ships)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", default="row.png")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        file = Path(args.lora) if args.lora else Path(folder) / "random.safetensors"
        if not args.lora:
            write_random_lora(file)
        allowed = [f"image.lora.folders=['{file.parent.absolute()}']"]  # in a YAML: lora: {folders: [...]}
        config = {"model": args.model} if args.model else {"config": "tiny_image"}
        params = [
            DiffusionParams(seed=args.seed, lora=[LoRA(file.name.removesuffix(".safetensors"), scale=scale)])
            for scale in SCALES
        ]
        with Omni(**config, overrides=allowed) as omni:
            outputs = omni.generate([args.prompt] * len(params), params)
    for output in outputs:
        if output.error is not None:
            raise SystemExit(f"error: {output.error}")
    pictures = [output.images[0] for output in outputs]
    row = Image.new("RGB", (sum(picture.width for picture in pictures), pictures[0].height))
    for index, picture in enumerate(pictures):
        row.paste(picture, (index * picture.width, 0))
    row.save(args.output)
    print(f"{args.output}: scales {', '.join(f'{scale:g}' for scale in SCALES)} of {file.name}")


if __name__ == "__main__":
    main()
