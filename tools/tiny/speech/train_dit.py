"""Trains transformers' flow matching transformer of Qwen2.5-Omni's token2wav, small: codes to log-mel spectrograms.

On the straight way from noise (time 0) to a spectrogram (time 1) it learns the velocity, mel minus noise, as its
sampler integrates it. A share of the rows has no condition: codes 0, a silent voice, the branch that guidance leaves.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniDiTConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniToken2WavDiTModel

from tools.tiny.common.muon import Optimizers
from tools.tiny.common.training import Trainer, mixed_precision
from tools.tiny.speech.codes import FRAMES, NUM_CODES, Codebook
from tools.tiny.speech.mel import FLOOR
from tools.tiny.speech.recordings import Recording, recording, recordings

CONFIG = dict(
    hidden_size=192,
    num_hidden_layers=6,
    num_attention_heads=3,
    head_dim=64,
    ff_mult=3,
    emb_dim=128,
    block_size=24,
    look_ahead_layers=[2],
    look_backward_layers=[0, 4],
    repeats=2,
    num_embeds=NUM_CODES + 1,  # as published: one more than there are codes
    mel_dim=80,
    dropout=0.0,
    enc_emb_dim=16,
    enc_dim=16,
    enc_channels=[32, 32, 32, 32, 96],
    enc_kernel_sizes=[5, 3, 3, 3, 1],
    enc_dilations=[1, 2, 3, 4, 1],
    enc_attention_channels=16,
    enc_res2net_scale=2,
    enc_se_channels=16,
    max_position_embeddings=4096,
    rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
)
PIECE = 144  # frames, six blocks
DROPPED = 0.15
MUON_PREFIXES = ("transformer_blocks.", "input_embed.proj")
SPEAKER_WORDS = ("hello", "yellow", "diamond")


def fresh_model(mean_mel: Tensor) -> Qwen2_5OmniToken2WavDiTModel:
    """Small random weights; it begins by answering the mean spectrum, and every block's gate a little open."""
    model = Qwen2_5OmniToken2WavDiTModel(Qwen2_5OmniDiTConfig(**CONFIG))
    model.set_attn_implementation("sdpa")
    width = CONFIG["hidden_size"]
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name or name.startswith("proj_out"):
            nn.init.zeros_(parameter)
        elif parameter.ndim >= 2:
            nn.init.normal_(parameter, std=0.5 if "codec_embed" in name else parameter[0].numel() ** -0.5)
    for block in model.transformer_blocks:
        nn.init.constant_(block.attn_norm.linear.bias[2 * width : 3 * width], 0.3)
        nn.init.constant_(block.attn_norm.linear.bias[5 * width :], 0.3)
    with torch.no_grad():
        model.proj_out.bias.copy_(mean_mel)
    return model


def speaker(seed: int) -> dict[str, Tensor]:
    """The voice as `spk_dict.pt` holds it: cond [1, 16], drawn; ref_mel [1, T, 80], a recording's."""
    cond = torch.randn(1, CONFIG["enc_emb_dim"], generator=torch.Generator().manual_seed(seed))
    return {"cond": cond, "ref_mel": recording(SPEAKER_WORDS).mel[None]}


class Batches:
    """Random pieces of spectrograms and their codes; each begins with a whole code, often with its sentence."""

    def __init__(self, data: list[Recording], codebook: Codebook, size: int, seed: int) -> None:
        rest = torch.full((PIECE, CONFIG["mel_dim"]), FLOOR)
        self.mels = [torch.cat([one.mel, rest]) for one in data]
        self.codes = [codebook.encode(mel) for mel in self.mels]
        self.size = size
        self.generator = torch.Generator().manual_seed(seed)

    def next(self) -> tuple[Tensor, Tensor]:
        """(mel [size, PIECE, 80], codes [size, PIECE / 2])."""
        mels, codes = [], []
        for row in torch.randint(len(self.mels), (self.size,), generator=self.generator).tolist():
            num_starts = max(0, len(self.mels[row]) - 2 * PIECE) // FRAMES + 1
            start = max(0, int(torch.randint(-num_starts // 3, num_starts, (), generator=self.generator)))
            mels.append(self.mels[row][start * FRAMES : start * FRAMES + PIECE])
            codes.append(self.codes[row][start : start + PIECE // FRAMES])
        return torch.stack(mels), torch.stack(codes)


def loss(
    model: Qwen2_5OmniToken2WavDiTModel,
    mel: Tensor,
    codes: Tensor,
    voice: dict[str, Tensor],
    generator: torch.Generator,
) -> Tensor:
    """Mean squared error of the velocity. mel [B, T, 80], codes [B, T / 2]."""
    size, num_frames = mel.shape[:2]
    time = torch.rand(size, generator=generator)
    noise = torch.randn(mel.shape, generator=generator)
    is_kept = (torch.rand(size, generator=generator) >= DROPPED)[:, None]
    noisy = mel * time[:, None, None] + noise * (1 - time[:, None, None])
    velocity = model(
        hidden_states=noisy,
        condition_vector=voice["ref_mel"] * is_kept[..., None],
        speaker_embedding=(voice["cond"] * is_kept)[:, None].expand(-1, num_frames, -1),
        quantized_code=codes * is_kept,
        time_step=time,
        apply_cfg=False,
    )
    return (velocity.float() - (mel - noise)).square().mean()


@torch.no_grad()
def sample(
    model: Qwen2_5OmniToken2WavDiTModel, codes: Tensor, voice: dict[str, Tensor], seed: int, num_points: int = 4
) -> Tensor:
    """[n] -> [2 n, 80], by the published sampler at fewer points and without guidance: more is hardly better."""
    torch.manual_seed(seed)
    found = model.sample(voice["cond"], voice["ref_mel"], codes[None], num_steps=num_points, guidance_scale=0.0)
    return found[0].T.contiguous()


def redrawn(data: list[Recording], folder: Path, codebook: Codebook, seed: int) -> list[Recording]:
    """The recordings, their spectrograms as the model trained in `folder` makes them of their codes."""
    model = Qwen2_5OmniToken2WavDiTModel(Qwen2_5OmniDiTConfig(**CONFIG))
    model.load_state_dict(load_file(folder / "dit.safetensors"))
    voice = load_file(folder / "speaker.safetensors")
    mels = [sample(model, codebook.encode(one.mel), voice, seed + row) for row, one in enumerate(data)]
    return [replace(one, mel=mel) for one, mel in zip(data, mels, strict=True)]


def mel_error(model: nn.Module, data: list[Recording], codebook: Codebook, voice: dict[str, Tensor]) -> float:
    """Mean distance of spectrograms made of codes from the recordings', where there is sound."""
    errors = []
    for one in data:
        loud = one.mel.amax(dim=1) > -2
        errors.append((sample(model, codebook.encode(one.mel), voice, 0) - one.mel)[loud].abs().mean())
    return float(torch.stack(errors).mean())


def train(
    folder: Path,
    codebook: Codebook,
    num_steps: int,
    num_recordings: int,
    batch_size: int,
    learning_rate: float,
    num_judged: int,
    seed: int,
) -> None:
    """The results are the folder's `dit.safetensors` and `speaker.safetensors`."""
    torch.manual_seed(seed)
    data, held = recordings(num_recordings, seed), recordings(num_judged, seed, held_out=True)
    voice = speaker(seed)
    model = fresh_model(torch.cat([one.mel for one in data]).mean(dim=0))
    trainer = Trainer(folder, num_steps, model, Optimizers(model, learning_rate, 0.01, matrices=MUON_PREFIXES))
    batches = Batches(data, codebook, batch_size, seed + trainer.run.step)
    while trainer.begin():
        mel, codes = batches.next()
        with mixed_precision():
            value = loss(model, mel, codes, voice, batches.generator)
        value.backward()
        trainer.step(velocity=value.detach())
        if trainer.is_at(250):
            trainer.run.log(held_mel_error=mel_error(model, held, codebook, voice))
    trainer.finish()
    print(f"held-out mel error: {mel_error(model, held, codebook, voice):.3f}")
    save_file(model.state_dict(), folder / "dit.safetensors")
    save_file(voice, folder / "speaker.safetensors")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/tiny-speech/dit"))
    parser.add_argument("--codebook", type=Path, default=Path("runs/tiny-speech/codebook.safetensors"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--recordings", type=int, default=800)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--judged", type=int, default=4, help="held-out recordings that judge it")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    codebook = Codebook.load(args.codebook)
    train(
        args.folder, codebook, args.steps, args.recordings, args.batch_size, args.learning_rate, args.judged, args.seed
    )


if __name__ == "__main__":
    main()
