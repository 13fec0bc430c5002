"""Trains the picture autoencoder (diffusers AutoencoderKL: 128 x 128 pixels <-> 16 x 16 x 16 latents).

The network is fully convolutional, so half of the steps see crops, which are cheap and full of edges, and
half see whole pictures, whose normalisation statistics are those of use.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from tools.tiny.common.muon import Optimizers
from tools.tiny.common.training import Trainer, mixed_precision
from tools.tiny.image.render import SIZE, draw_scene
from tools.tiny.image.world import sample_scene

CONFIG = dict(
    block_out_channels=(16, 32, 64, 96),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=1,
    latent_channels=16,
    norm_num_groups=8,
    mid_block_add_attention=False,
    use_quant_conv=False,
    use_post_quant_conv=False,
    sample_size=SIZE,
)
KL_WEIGHT = 2e-4
CROP = 64


def pictures(count: int, seed: int) -> torch.Tensor:
    """[count, 3, SIZE, SIZE] uint8 of random scenes."""
    rng = random.Random(seed)
    drawn = np.stack([draw_scene(sample_scene(rng), rng) for _ in range(count)])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).contiguous()


def batch(data: torch.Tensor, step: int, generator: torch.Generator) -> torch.Tensor:
    """Whole pictures on odd steps, four times as many crops on even ones; float32 in [-1, 1]."""
    if step % 2:
        chosen = data[torch.randint(len(data), (8,), generator=generator)]
    else:
        index = torch.randint(len(data), (32,), generator=generator).tolist()
        offsets = torch.randint(SIZE - CROP + 1, (32, 2), generator=generator).tolist()
        chosen = torch.stack([data[i, :, y : y + CROP, x : x + CROP] for i, (y, x) in zip(index, offsets, strict=True)])
    return (chosen.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def loss_terms(vae: AutoencoderKL, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean absolute error + twice the mean squared error, mean KL divergence per latent)."""
    with mixed_precision():
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample()).sample
    difference = decoded.float() - images
    divergence = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    return difference.abs().mean() + 2 * (difference**2).mean(), divergence


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: torch.Tensor) -> float:
    decoded = vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
    return float(-10 * torch.log10(F.mse_loss(decoded, images) / 4))


def train(folder: Path, num_steps: int, num_pictures: int, learning_rate: float, seed: int) -> AutoencoderKL:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    vae = AutoencoderKL(**CONFIG).to(memory_format=torch.channels_last)
    optimizer = Optimizers(vae, learning_rate, weight_decay=0.01)
    trainer = Trainer(folder, num_steps, vae, optimizer)
    generator.manual_seed(seed + trainer.run.step)
    data = pictures(num_pictures, seed)
    held = batch(pictures(16, seed + 1), 1, generator)
    while trainer.begin():
        reconstruction, divergence = loss_terms(vae, batch(data, trainer.run.step, generator))
        (reconstruction + KL_WEIGHT * divergence).backward()
        trainer.step(reconstruction=reconstruction.detach(), divergence=divergence.detach())
        if trainer.is_at(50):
            trainer.run.log(psnr=psnr(vae, held))
    trainer.finish()
    normalise_latents(vae, data[:512])
    vae.save_pretrained(folder / "vae")
    return vae


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, data: torch.Tensor) -> None:
    """Sets scaling and shift so that (latent - shift) * scaling has mean 0 and deviation 1."""
    images = (data.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in images.split(64)])
    vae.register_to_config(shift_factor=float(latents.mean()), scaling_factor=float(1 / latents.std()))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/tiny-image/vae"))
    parser.add_argument("--steps", type=int, default=1700)
    parser.add_argument("--pictures", type=int, default=8000)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    train(args.folder, args.steps, args.pictures, args.learning_rate, args.seed)


if __name__ == "__main__":
    main()
