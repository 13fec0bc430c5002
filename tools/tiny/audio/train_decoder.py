"""Goes on training the decoder of the sound autoencoder alone; the encoder stays as the sound model knows it.

In turn on encoded sounds with noise, and on latents that the sound model has made (`tools.tiny.audio.generated`), whose
errors are the ones that the decoder will meet.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderOobleck
from safetensors.torch import load_file
from torch import Tensor

from tools.tiny.audio.audio_data import drawn
from tools.tiny.audio.render import render
from tools.tiny.audio.train_vae import HOP, plain_convolutions, published, spectra_distance
from tools.tiny.common.muon import Optimizers
from tools.tiny.common.training import Trainer

CROP, EDGE = 72, 8  # frames; what is decoded next to an edge is not judged
NOISE = 0.15  # the most, in deviations of a latent


def recordings(count: int, seed: int) -> Tensor:
    """[count, 32000]: the sounds of the training set, in its order."""
    rng, found = random.Random(seed), []
    while len(found) < count:
        found += [render(sound) for sound in drawn(rng)[0]]
    return torch.from_numpy(np.stack(found[:count]))


class Pairs:
    """Random crops of latents and of the samples that they mean."""

    def __init__(self, latents: Tensor, samples: Tensor, seed: int) -> None:
        self.latents, self.samples = latents, samples
        self.generator = torch.Generator().manual_seed(seed)

    def next(self, size: int, noise: float) -> tuple[Tensor, Tensor]:
        """([size, 16, CROP], [size, (CROP - 2 EDGE) * HOP]); early crops are the more frequent, as sounds end early."""
        rows = torch.randint(len(self.latents), (size,), generator=self.generator).tolist()
        most = self.latents.shape[1] - CROP
        starts = (torch.rand(size, generator=self.generator) ** 2 * (most + 1)).long().tolist()
        latents = torch.stack([self.latents[row, s : s + CROP] for row, s in zip(rows, starts, strict=True)]).float()
        wanted = [
            self.samples[row, (s + EDGE) * HOP : (s + CROP - EDGE) * HOP] for row, s in zip(rows, starts, strict=True)
        ]
        level = noise * torch.rand(size, 1, 1, generator=self.generator)
        latents = latents + level * torch.randn(latents.shape, generator=self.generator)
        return latents.transpose(1, 2), torch.stack(wanted)


def loss(vae: AutoencoderOobleck, latents: Tensor, wanted: Tensor) -> Tensor:
    """Waveform error relative to each crop's level, and the distance of spectra."""
    decoded = vae.decoder(latents)[:, 0, EDGE * HOP : -EDGE * HOP]
    level = wanted.pow(2).mean(dim=1, keepdim=True).sqrt() + 0.02
    return ((decoded - wanted) / level).pow(2).mean() + 2 * spectra_distance(decoded, wanted)


def train(
    folder: Path, vae: AutoencoderOobleck, sources: list[Pairs], num_steps: int, size: int, lr: float, seed: int
) -> None:
    """Takes from the sources in turn. The result is the folder's `vae`."""
    torch.manual_seed(seed)
    kernels = [name for name, _ in vae.decoder.named_parameters() if name.endswith("weight")]
    optimizer = Optimizers(vae.decoder, lr, weight_decay=0.01, matrices=kernels)
    trainer = Trainer(folder, num_steps, vae.decoder, optimizer, decay=0.998)
    compiled_loss = torch.compile(loss)
    while trainer.begin():
        index = trainer.run.step % len(sources)
        value = compiled_loss(vae, *sources[index].next(size, NOISE if index == 0 else 0.0))
        value.backward()
        trainer.step(loss=value.detach())
    trainer.finish()
    published(vae).save_pretrained(folder / "vae")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/tiny-audio/decoder"))
    parser.add_argument("--vae", type=Path, default=Path("runs/tiny-audio/vae/vae"))
    parser.add_argument("--data", type=Path, default=Path("runs/tiny-audio/data.safetensors"))
    parser.add_argument("--generated", type=Path, help="latents that the sound model made")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--sounds", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    vae = plain_convolutions(AutoencoderOobleck.from_pretrained(args.vae))
    latents = load_file(args.data)["latents"][: args.sounds]
    samples = recordings(len(latents), args.seed)
    sources = [Pairs(latents, samples, args.seed)]
    if args.generated is not None:
        made = load_file(args.generated)["latents"]
        sources.append(Pairs(made, recordings(len(made), args.seed), args.seed + 1))
    train(args.folder, vae, sources, args.steps, args.batch_size, args.learning_rate, args.seed)


if __name__ == "__main__":
    main()
