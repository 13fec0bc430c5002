"""Latents that the trained sound model makes for prompts of its training set: what its decoder will really be given."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from tools.tiny.audio.train_audio import SHIFT, SoundModel, context_latents
from tools.tiny.common.training import mixed_precision

NUM_STEPS = 8
CHUNK = 64


@torch.no_grad()
def generate(model: SoundModel, noise: Tensor, context: Tensor, states: Tensor, lengths: Tensor) -> Tensor:
    """[B, T, C] noise to latents: Euler steps over the sampler's own levels."""
    levels = torch.linspace(1, 0, NUM_STEPS + 1)
    levels = SHIFT * levels / (1 + (SHIFT - 1) * levels)
    latents = noise
    for level, following in zip(levels[:-1], levels[1:], strict=True):
        velocity, *_ = model(latents, level.expand(len(latents)), context, states, lengths)
        latents = latents + (following - level) * velocity.float()
    return latents


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/tiny-audio"))
    parser.add_argument("--sounds", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    data = load_file(args.folder / "data.safetensors")
    state = torch.load(args.folder / "audio/checkpoint.pt", weights_only=True)
    model = SoundModel(data)
    model.load_state_dict(state["model"])
    model.load_state_dict(state["average"], strict=False)
    meant = data["latents"][: args.sounds].float()
    context = context_latents(data["silence"], meant.shape[1])
    generator, made = torch.Generator().manual_seed(args.seed), []
    for rows in tqdm(torch.arange(len(meant)).split(CHUNK), desc="generated", mininterval=10):
        noise = torch.randn(len(rows), *meant.shape[1:], generator=generator)
        with mixed_precision(), sdpa_kernel(SDPBackend.MATH):
            made.append(generate(model, noise, context, data["states"][rows].float(), data["lengths"][rows]))
    latents = torch.cat(made)
    error = (latents - meant).pow(2).mean().sqrt()
    print(f"{len(meant)} sounds, root mean square error of their latents {error:.3f}")
    save_file({"latents": latents.half().contiguous()}, args.folder / "generated.safetensors")


if __name__ == "__main__":
    main()
