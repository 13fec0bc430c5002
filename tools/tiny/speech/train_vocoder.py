"""Trains the vocoder: transformers' BigVGAN of Qwen2.5-Omni, small, from log-mel spectrograms to samples.

The loss is the distance of short-time spectra at several resolutions, of magnitudes and of how phases turn. What lies
at the edges of a piece, where the vocoder lacks its context, is not judged. Half of the spectrograms are those that the
flow matching model makes of a recording's codes: such it will meet.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniBigVGANConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniToken2WavBigVGANModel

from tools.tiny.common.muon import Optimizers
from tools.tiny.common.training import Trainer
from tools.tiny.speech.codes import Codebook
from tools.tiny.speech.mel import HOP, log_mel
from tools.tiny.speech.quick_activation import with_quick_activations
from tools.tiny.speech.recordings import Pieces, Recording, recordings
from tools.tiny.speech.spectra import spectra_distance
from tools.tiny.speech.train_dit import redrawn

CONFIG = dict(
    mel_dim=80,
    upsample_initial_channel=256,
    resblock_kernel_sizes=[3, 7],
    resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]],
    upsample_rates=[3, 4, 4, 5],
    upsample_kernel_sizes=[7, 8, 8, 11],
)
PIECE, EDGE = 54, 3  # frames; what is decoded next to an edge is not judged
NOISE = 0.05  # the most, in logarithms of amplitudes


def fresh_model() -> Qwen2_5OmniToken2WavBigVGANModel:
    """Small random weights: residual branches begin almost closed."""
    model = Qwen2_5OmniToken2WavBigVGANModel(Qwen2_5OmniBigVGANConfig(**CONFIG))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3:
            fan_in = parameter.shape[1] * parameter.shape[2]
            if name.startswith("ups."):  # [in, out, kernel]: about two taps of every input channel meet in a sample
                fan_in = 2 * parameter.shape[0]
            nn.init.normal_(parameter, std=(0.3 if "convs2" in name else 0.9) * fan_in**-0.5)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    nn.init.normal_(model.conv_post.weight, std=0.01)
    return model


def decode(vocoder: Qwen2_5OmniToken2WavBigVGANModel, mel: Tensor) -> Tensor:
    """mel [B, T, 80] -> samples [B, T * 240]."""
    samples: Tensor = vocoder(mel.transpose(1, 2))
    return samples.reshape(len(mel), -1)


@torch.no_grad()
def mel_error(vocoder: Qwen2_5OmniToken2WavBigVGANModel, data: list[Recording]) -> float:
    """Mean distance of the log-mel spectrogram of what is decoded, where there is sound."""
    errors = []
    for one in data:
        loud = one.mel.amax(dim=1) > -2
        errors.append((log_mel(decode(vocoder, one.mel[None])[0]) - one.mel)[loud].abs().mean())
    return float(torch.stack(errors).mean())


def train(
    folder: Path, data: list[Recording], num_steps: int, batch_size: int, learning_rate: float, seed: int
) -> None:
    """The result is the folder's `vocoder.safetensors`."""
    torch.manual_seed(seed)
    vocoder = with_quick_activations(fresh_model())
    kernels = [name for name, parameter in vocoder.named_parameters() if parameter.ndim == 3]
    trainer = Trainer(folder, num_steps, vocoder, Optimizers(vocoder, learning_rate, 0.01, matrices=kernels))
    pieces = Pieces(data, PIECE, seed + trainer.run.step)
    held = recordings(4, seed, held_out=True)
    kept = slice(EDGE * HOP, (PIECE - EDGE) * HOP)
    while trainer.begin():
        mel, samples = pieces.next(batch_size)
        level = NOISE * torch.rand(batch_size, 1, 1, generator=pieces.generator)
        noisy = mel + level * torch.randn(mel.shape, generator=pieces.generator)
        value = spectra_distance(decode(vocoder, noisy)[:, kept], samples[:, kept])
        value.backward()
        trainer.step(spectrum=value.detach())
        if trainer.is_at(50):
            trainer.run.log(held_mel_error=mel_error(vocoder, held))
    trainer.finish()
    save_file(vocoder.state_dict(), folder / "vocoder.safetensors")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/tiny-speech/vocoder"))
    parser.add_argument("--dit", type=Path, default=Path("runs/tiny-speech/dit"))
    parser.add_argument("--codebook", type=Path, default=Path("runs/tiny-speech/codebook.safetensors"))
    parser.add_argument("--steps", type=int, default=1900)
    parser.add_argument("--recordings", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    data = recordings(args.recordings, args.seed)
    data += redrawn(data, args.dit, Codebook.load(args.codebook), args.seed)
    train(args.folder, data, args.steps, args.batch_size, args.learning_rate, args.seed)


if __name__ == "__main__":
    main()
