"""Trains the sound autoencoder (diffusers AutoencoderOobleck: 16 kHz mono <-> 16 channels at 100 Hz).

A frame is 160 samples, so every note of the quarter-second grid begins on a frame. The decoder is trained on latents
with noise, since the sound model's are never exact. Plain convolutions are trained and put under weight norm, the
published form, at the end.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderOobleck
from torch import Tensor, nn
from torch.nn.utils import remove_weight_norm

from tools.tiny.audio.render import SAMPLE_RATE, render
from tools.tiny.audio.world import sample_sound
from tools.tiny.common.muon import Optimizers
from tools.tiny.common.training import Trainer

CONFIG = dict(
    encoder_hidden_size=32,
    downsampling_ratios=[10, 16],
    channel_multiples=[2, 4],
    decoder_channels=32,
    decoder_input_channels=16,
    audio_channels=1,
    sampling_rate=SAMPLE_RATE,
)
HOP = 160
CROP_S = 0.5
NOISE = 0.2  # of a latent's deviation
STFT_SIZES = (128, 512, 2048)


def plain_convolutions(vae: AutoencoderOobleck) -> AutoencoderOobleck:
    """Folds weight norm into the weights: faster, and Muon may have them."""
    for module in vae.modules():
        if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
            remove_weight_norm(module)
    return vae


def fresh_model() -> AutoencoderOobleck:
    vae = plain_convolutions(AutoencoderOobleck(**CONFIG))
    for name, parameter in vae.named_parameters():
        if parameter.ndim == 3 and not name.endswith(("alpha", "beta")):
            fan_in = parameter.shape[1] * parameter.shape[2]
            if "conv_t1" in name:  # [in, out, 2 * stride]: two taps of every input channel meet in a sample
                fan_in = 2 * parameter.shape[0]
            nn.init.normal_(parameter, std=(0.3 if "res_unit" in name and "conv2" in name else 0.9) * fan_in**-0.5)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    nn.init.normal_(vae.decoder.conv2.weight, std=0.01)
    return vae


def recordings(count: int, seed: int) -> Tensor:
    """[count, 1, 32000] of random sounds."""
    rng = random.Random(seed)
    return torch.from_numpy(np.stack([render(sample_sound(rng)) for _ in range(count)]))[:, None]


def crops(data: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """[size, 1, CROP_S * 16000], beginning on a frame; silence is rarely chosen."""
    length = int(CROP_S * SAMPLE_RATE)
    rows = torch.randint(len(data), (size,), generator=generator).tolist()
    starts = torch.randint((data.shape[-1] - length) // HOP + 1, (size,), generator=generator).tolist()
    chosen = torch.stack([data[row, :, s * HOP : s * HOP + length] for row, s in zip(rows, starts, strict=True)])
    silent = chosen.abs().amax(dim=(1, 2)) < 1e-3
    chosen[silent] = torch.stack([data[row, :, :length] for row in rows])[silent]
    return chosen


def spectra_distance(decoded: Tensor, wanted: Tensor) -> Tensor:
    """Mean distance of the square roots of short-time spectra, over several window sizes. [B, n] each."""
    distances = []
    for size in STFT_SIZES:
        window = torch.hann_window(size)
        magnitudes = [
            torch.stft(x, size, size // 4, window=window, return_complex=True).abs().add(1e-4).sqrt()
            for x in (decoded, wanted)
        ]
        distances.append(F.l1_loss(*magnitudes))
    return torch.stack(distances).mean()


def loss_terms(vae: AutoencoderOobleck, samples: Tensor) -> tuple[Tensor, Tensor]:
    """(waveform error relative to each crop's level, spectral distance)."""
    mean = vae.encode(samples).latent_dist.mean
    scaled = mean / (mean.std(dim=(0, 2), keepdim=True) + 1e-3)
    decoded = vae.decode(scaled + NOISE * torch.randn_like(mean)).sample
    level = samples.pow(2).mean(dim=(1, 2), keepdim=True).sqrt() + 0.02
    waveform = ((decoded - samples) / level).pow(2).mean()
    return waveform, spectra_distance(decoded[:, 0], samples[:, 0])


@torch.no_grad()
def signal_to_noise_db(vae: AutoencoderOobleck, samples: Tensor, noise: float) -> float:
    """Median over recordings of reconstructions from latents with that much noise."""
    latents = vae.encode(samples).latent_dist.mode()
    scaled = latents / latents.std(dim=(0, 2), keepdim=True)
    decoded = vae.decode(scaled + noise * torch.randn_like(scaled)).sample
    ratio = samples.pow(2).sum((1, 2)) / (decoded - samples).pow(2).sum((1, 2))
    return float(10 * torch.log10(ratio).median())


def train(folder: Path, num_steps: int, num_recordings: int, batch_size: int, learning_rate: float, seed: int) -> None:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    vae = fresh_model()
    kernels = [name for name, _ in vae.named_parameters() if name.endswith("weight")]
    optimizer = Optimizers(vae, learning_rate, weight_decay=0.01, matrices=kernels)
    trainer = Trainer(folder, num_steps, vae, optimizer)
    generator.manual_seed(seed + trainer.run.step)
    data, held = recordings(num_recordings, seed), recordings(16, seed + 1)
    compiled_terms = torch.compile(loss_terms)
    while trainer.begin():
        waveform, spectrum = compiled_terms(vae, crops(data, batch_size, generator))
        (waveform + 2 * spectrum).backward()
        trainer.step(waveform=waveform.detach(), spectrum=spectrum.detach())
        if trainer.is_at(50):
            clean, noisy = (signal_to_noise_db(vae, held, noise) for noise in (0.0, NOISE))
            trainer.run.log(clean_db=clean, noisy_db=noisy)
    trainer.finish()
    normalise_latents(vae, data[:256])
    published(vae).save_pretrained(folder / "vae")


@torch.no_grad()
def normalise_latents(vae: AutoencoderOobleck, samples: Tensor) -> None:
    """Rescales every latent channel to deviation 1 in the last encoder layer (the decoder was trained on such), and
    makes the posterior as good as certain: ACE-Step's pipeline knows no scaling factor.
    """
    latents = vae.encode(samples).latent_dist.mode()
    scale = latents.transpose(0, 1).flatten(1).std(dim=1).clamp(min=1e-3)
    channels = len(scale)
    vae.encoder.conv2.weight[:channels] /= scale[:, None, None]
    vae.encoder.conv2.bias[:channels] /= scale
    vae.encoder.conv2.weight[channels:] *= 1e-4  # not 0: weight norm divides by the length
    vae.encoder.conv2.bias[channels:] = -12.0


@torch.no_grad()
def published(vae: AutoencoderOobleck) -> AutoencoderOobleck:
    """The same model with its convolutions under weight norm: direction v, length g."""
    model = AutoencoderOobleck(**CONFIG)
    plain = vae.state_dict()
    state = {}
    for name in model.state_dict():
        if name.endswith(("weight_g", "weight_v")):
            weight = plain[name[:-2]]
            is_length = name.endswith("weight_g")
            state[name] = torch.linalg.vector_norm(weight, dim=(1, 2), keepdim=True) if is_length else weight
        else:
            state[name] = plain[name]
    model.load_state_dict(state)
    return model


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/tiny-audio/vae"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--recordings", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    train(args.folder, args.steps, args.recordings, args.batch_size, args.learning_rate, args.seed)


if __name__ == "__main__":
    main()
