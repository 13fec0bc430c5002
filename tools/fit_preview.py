"""Fits the map that makes previews of running pictures cheap, and writes it beside the VAE as preview.json.

    python tools/fit_preview.py path/to/Z-Image-Turbo --pictures photos/
    python tools/fit_preview.py path/to/checkpoint/vae -o preview.json

Pictures are encoded by the VAE, and least squares find how a latent's channels, and products of two of them, become
the mean colour of the pixels that it covers. Without --pictures it draws scenes of coloured shapes; photographs fit a
VAE of photographs better. Prints how well the map explains pictures that were not used. The map belongs to one VAE,
whatever is sampled with it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.tiny.image.render import draw_scene
from tools.tiny.image.world import sample_scene
from vllm_omni.errors import OmniError
from vllm_omni.utils.files import resolve_model_folder
from vllm_omni.worker.diffusion.preview_map import PREVIEW_FILE, PreviewMap
from vllm_omni.worker.diffusion.previewer import Colours

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
HELD_OUT = 5  # every fifth picture judges the map
DIGITS = 5
MIN_PICTURES = HELD_OUT


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a pipeline's folder, its vae folder, or asset://name")
    parser.add_argument("--pictures", type=Path, help="a folder of pictures (default: scenes that are drawn)")
    parser.add_argument("--count", type=int, default=200, help="how many pictures at most")
    parser.add_argument("--size", type=int, default=512, help="their longest side in pixels (default: 512)")
    parser.add_argument("-o", "--output", type=Path, help=f"where to write (default: {PREVIEW_FILE} beside the VAE)")
    args = parser.parse_args(arguments)
    try:
        folder = resolve_model_folder(args.checkpoint)
        folder = folder / "vae" if (folder / "vae").is_dir() else folder
        vae = AutoencoderKL.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False
        )
    except (OmniError, OSError, ValueError) as error:
        raise SystemExit(f"{args.checkpoint}: {error}") from None
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    pictures = drawn(args.count) if args.pictures is None else read(args.pictures, args.count, args.size, scale)
    if len(pictures) < MIN_PICTURES:
        raise SystemExit(f"--pictures: got {len(pictures)}, expected at least {MIN_PICTURES} of {', '.join(SUFFIXES)}")

    pairs = [rows_of(vae.eval(), picture) for picture in tqdm(pictures, desc="encode", disable=None)]
    used = [pair for index, pair in enumerate(pairs) if index % HELD_OUT]
    found = fit(*joined(used))
    path = args.output or folder / PREVIEW_FILE
    path.write_text(as_json(found) + "\n", encoding="utf-8")
    share, distance = judge(found, *joined(pairs[::HELD_OUT]))
    print(f"{path}: explains {share:.1%} of the colours of other pictures, {distance:.3f} off on average (of 1)")


def drawn(count: int) -> list[np.ndarray]:
    """[H, W, 3] uint8 each, always the same ones."""
    rng = random.Random(0)
    return [draw_scene(sample_scene(rng, allow_unseen=True), rng) for _ in range(count)]


def read(folder: Path, count: int, size: int, multiple: int) -> list[np.ndarray]:
    """Pictures of a folder, at most `size` pixels long, cut to whole latents."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)[:count]
    pictures = []
    for path in paths:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
        upright.thumbnail((size, size))
        height, width = (side - side % multiple for side in (upright.height, upright.width))
        if height and width:
            pictures.append(np.array(upright)[:height, :width])
    return pictures


@torch.inference_mode()
def rows_of(vae: AutoencoderKL, picture: np.ndarray) -> tuple[Tensor, Tensor]:
    """[n, C] latents as a sampler has them, and the mean colours [n, 3], 0 to 1, of the pixels below each."""
    pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 255
    latents = vae.encode(pixels * 2 - 1).latent_dist.mode()
    latents = (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
    colours = F.interpolate(pixels, latents.shape[2:], mode="area")
    return latents[0].flatten(1).T, colours[0].flatten(1).T


def joined(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([latents for latents, _ in pairs]), torch.cat([colours for _, colours in pairs])


def fit(latents: Tensor, colours: Tensor) -> PreviewMap:
    """Least squares with a constant, in float64."""
    num_channels = latents.shape[1]
    first, second = torch.triu_indices(num_channels, num_channels)
    products = latents[:, first] * latents[:, second]
    inputs = torch.cat([torch.ones(len(latents), 1), latents, products], dim=1).double()
    solution = torch.linalg.lstsq(inputs, colours.double(), driver="gelsd").solution
    bias, *rows = (tuple(round(value, DIGITS) for value in row) for row in solution.tolist())
    return PreviewMap(factors=tuple(rows[:num_channels]), bias=bias, products=tuple(rows[num_channels:]))


def judge(found: PreviewMap, latents: Tensor, colours: Tensor) -> tuple[float, float]:
    """(share of the variance that the map explains, mean absolute difference)."""
    shown = Colours(found, torch.device("cpu"))(latents.T[:, None])[:, 0].T
    rest = (colours - shown).square().sum() / (colours - colours.mean(0)).square().sum()
    return 1 - float(rest), float((colours - shown).abs().mean())


def as_json(found: PreviewMap) -> str:
    """A row of numbers to a line."""
    parts = [f'"bias": {json.dumps(found.bias)}']
    for name, rows in (("factors", found.factors), ("products", found.products)):
        lines = ",\n".join(f"    {json.dumps(row)}" for row in rows)
        parts.append(f'"{name}": [\n{lines}\n  ]')
    return "{\n  " + ",\n  ".join(parts) + "\n}"


if __name__ == "__main__":
    main()
