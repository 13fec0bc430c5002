"""Trains the sound DiT (diffusers AceStepTransformer1DModel) and its text projection by flow matching on cached
latents and text states.

A second loss asks the third block which notes, timbre and level sound at each place. Without it the words are hardly
found: what they change in the latents is a pattern of phases whose mean over all notes is zero. A third keeps the
stream between the blocks from growing: no norm bounds it, and in a loud one the noise, which must pass, is lost.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AceStepTransformer1DModel
from diffusers.models.transformers.ace_step_transformer import _ace_step_rotary_freqs
from diffusers.pipelines.ace_step import AceStepConditionEncoder
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tools.tiny.audio.audio_data import PLACE_FRAMES, ROLL_WIDTH, TEXT_LENGTH, piano_rolls, training_data
from tools.tiny.common.muon import Optimizers
from tools.tiny.common.training import Trainer, mixed_precision

WIDTH = 192
CHANNELS = 16
SHIFT = 3.0
PURE_NOISE_SHARE = 0.35
FLOOR = 0.01
READ_AFTER = 3  # blocks
READING_WEIGHT = 1.0
POWER_WEIGHT = 5e-3
NOISE_GAIN = 2.0
WEIGHT_DECAY = 0.1
# The time embedding is nearly the same vector for most inputs, so that steps on it add up: at the full rate the
# modulation of all blocks grew until the stream of the first one was a hundred times as loud as the noise.
RATES = {"transformer.time_embed.": 0.1}
SILENCE_FRAMES = 3000  # thirty seconds, what the timbre encoder is given where there is no reference
TRANSFORMER = dict(
    hidden_size=WIDTH,
    intermediate_size=512,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=32,
    in_channels=3 * CHANNELS,
    audio_acoustic_hidden_dim=CHANNELS,
    patch_size=PLACE_FRAMES,
    rope_theta=10000.0,
    sliding_window=128,
    encoder_hidden_size=WIDTH,
    is_turbo=True,
    model_version="turbo",
)
CONDITION_ENCODER = dict(
    hidden_size=WIDTH,
    intermediate_size=64,
    text_hidden_dim=WIDTH,
    timbre_hidden_dim=CHANNELS,
    num_lyric_encoder_hidden_layers=1,
    num_timbre_encoder_hidden_layers=1,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=32,
)


class SoundModel(nn.Module):
    """The transformer, and what of the condition encoder learns: the text projection. Lyrics and timbre are the same
    for every sound, so their encoders keep their first weights and give constants.
    """

    def __init__(self, data: dict[str, Tensor]) -> None:
        super().__init__()
        self.transformer = AceStepTransformer1DModel(**TRANSFORMER)
        self.project = nn.Linear(WIDTH, WIDTH, bias=False)
        self.reader = nn.Linear(WIDTH, ROLL_WIDTH)
        encoder = AceStepConditionEncoder(**CONDITION_ENCODER).eval().requires_grad_(False)
        self.encoder = [encoder]  # in a list: neither trained nor saved with the rest
        states = data["states"][:4000][torch.arange(TEXT_LENGTH) < data["lengths"][:4000, None]].float()
        values, vectors = torch.linalg.eigh(torch.cov(states.T.double()))
        whitening = vectors @ torch.diag((values.clamp(min=0) + FLOOR).rsqrt()) @ vectors.T
        self.register_buffer("mean", states.mean(0))
        self.register_buffer("whitening", whitening.float())
        self.register_buffer("constant", self._constant_tokens(data))
        self._initialise()

    @torch.no_grad()
    def _constant_tokens(self, data: dict[str, Tensor]) -> Tensor:
        """[L, D]: the encoded empty lyrics, then the timbre of silence, as the pipeline orders them."""
        encoder = self.encoder[0]
        lyrics = data["lyrics"][None].float()
        encoded = encoder.lyric_encoder(lyrics, torch.ones(lyrics.shape[:2], dtype=torch.bool))
        silence = silence_latent(data["silence"], SILENCE_FRAMES)
        timbre, _ = encoder.timbre_encoder(silence, torch.zeros(1, dtype=torch.long))
        return torch.cat([encoded[0], timbre[0]])

    def _initialise(self) -> None:
        """Gates a little open. The noise passes through: it is loud in the stream between the blocks, which has no norm
        of its own, and read off again at the end.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or "time_proj" in name:
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        with torch.no_grad():
            frame = nn.init.orthogonal_(torch.empty(WIDTH, CHANNELS * PLACE_FRAMES)).view(WIDTH, CHANNELS, PLACE_FRAMES)
            self.transformer.proj_in_conv.weight.zero_()[:, 2 * CHANNELS :] = NOISE_GAIN * frame
            self.transformer.proj_out_conv.weight.copy_(frame * (CHANNELS * PLACE_FRAMES / WIDTH) ** 0.5)
            self.transformer.scale_shift_table.zero_()
            for layer in self.transformer.layers:
                layer.scale_shift_table.zero_()
                layer.scale_shift_table[:, [2, 5]] = 0.3
            for parameter in self.transformer.time_embed_r.parameters():
                parameter.zero_()
        self.transformer.time_embed_r.requires_grad_(False)

    def offset(self) -> Tensor:
        """[D]: what the whitening's mean comes to after both projections; moved into a bias at export."""
        return self.transformer.condition_embedder.weight @ self.project.weight @ (self.whitening @ self.mean)

    def condition(self, states: Tensor) -> Tensor:
        """[B, T, D] text states -> [B, L + T, D] tokens for cross-attention."""
        text = self.project(states @ self.whitening)
        tokens = torch.cat([self.constant.expand(len(states), -1, -1), text], dim=1)
        return self.transformer.condition_embedder(tokens) - self.offset()

    def forward(
        self, noisy: Tensor, level: Tensor, context: Tensor, states: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The transformer's forward with padding of the text left out of attention. noisy: [B, T, C] -> velocity like
        it, logits of what sounds [B, T / PLACE_FRAMES, ROLL_WIDTH], and the mean square of stream and condition.
        """
        model = self.transformer
        time, modulation = model.time_embed(level)
        hidden = torch.cat([context.expand(len(noisy), -1, -1), noisy], dim=-1).transpose(1, 2)
        hidden = model.proj_in_conv(hidden).transpose(1, 2)
        condition = self.condition(states)
        is_real = torch.arange(TEXT_LENGTH) < lengths[:, None]
        is_real = torch.cat([is_real.new_ones(len(noisy), len(self.constant)), is_real], dim=1)
        mask = torch.where(is_real, 0.0, -torch.inf)[:, None, None]
        rope = _ace_step_rotary_freqs(hidden.shape[1], 32, 10000.0, hidden.device, hidden.dtype)
        streams = []
        for layer in model.layers:
            hidden = layer(hidden, rope, modulation, None, condition, mask)
            streams.append(hidden)
        read = self.reader(nn.functional.rms_norm(streams[READ_AFTER - 1], (WIDTH,)))
        power = torch.stack([stream.float().pow(2).mean() for stream in (*streams, condition)]).mean()
        shift, scale = (model.scale_shift_table + time.unsqueeze(1)).chunk(2, dim=1)
        hidden = model.norm_out(hidden) * (1 + scale) + shift
        velocity = model.proj_out_conv(hidden.transpose(1, 2).to(model.proj_out_conv.weight.dtype)).transpose(1, 2)
        return velocity, read, power


def silence_latent(silence: Tensor, frames: int) -> Tensor:
    """[1, frames, C] of encoded silence, repeated."""
    repeats = -(-frames // len(silence))
    return silence.float().repeat(repeats, 1)[None, :frames]


class Batches:
    """Random batches of (latents, text states, text lengths, piano rolls)."""

    def __init__(self, data: dict[str, Tensor], rolls: Tensor, size: int, seed: int) -> None:
        self.data, self.rolls, self.size = data, rolls, size
        self.generator = torch.Generator().manual_seed(seed)

    def next(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = torch.randint(len(self.rolls), (self.size,), generator=self.generator)
        data = self.data
        return data["latents"][rows].float(), data["states"][rows].float(), data["lengths"][rows], self.rolls[rows]

    def noise_levels(self) -> Tensor:
        """[size] in [0, 1]: logit-normal, shifted towards noise; a third of them next to pure noise, where the words
        must be read.
        """
        level = torch.randn(self.size, generator=self.generator).sigmoid()
        shifted = SHIFT * level / (1 + (SHIFT - 1) * level)
        almost_pure = 1 - 0.08 * torch.rand(self.size, generator=self.generator) ** 2
        return torch.where(torch.rand(self.size, generator=self.generator) < PURE_NOISE_SHARE, almost_pure, shifted)

    def noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator)


def context_latents(silence: Tensor, frames: int) -> Tensor:
    """[1, frames, 2 C]: nothing to keep, everything to make."""
    source = silence_latent(silence, frames)
    return torch.cat([source, torch.ones_like(source)], dim=-1)


def losses(
    model: SoundModel,
    clean: Tensor,
    noise: Tensor,
    level: Tensor,
    context: Tensor,
    states: Tensor,
    lengths: Tensor,
    roll: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean squared error of the velocity (noise minus clean), how badly it is read what sounds, and how loud the
    stream between the blocks is.
    """
    noisy = clean + level[:, None, None] * (noise - clean)
    velocity, read, power = model(noisy, level, context, states, lengths)
    error = (velocity.float() - (noise - clean)).pow(2).mean()
    surprise = nn.functional.binary_cross_entropy_with_logits(read.float(), roll, reduction="none")
    return error, surprise.sum(-1).mean(), power


def train(
    folder: Path, data: dict[str, Tensor], num_steps: int, batch_size: int, learning_rate: float, seed: int
) -> None:
    torch.manual_seed(seed)
    model = SoundModel(data)
    matrices = [name for name, parameter in model.named_parameters() if name.endswith("weight") and parameter.ndim > 1]
    optimizer = Optimizers(model, learning_rate, WEIGHT_DECAY, matrices, RATES)
    trainer = Trainer(folder, num_steps, model, optimizer, decay=0.998, constants={"encoder": model.encoder[0]})
    batches = Batches(data, piano_rolls(len(data["latents"]), seed), batch_size, seed + trainer.run.step)
    context = context_latents(data["silence"], data["latents"].shape[1])
    compiled_losses = torch.compile(losses, dynamic=False)
    while trainer.begin():
        clean, states, lengths, roll = batches.next()
        # Rows are short (40 tokens): plain matrix products are faster than the fused attention's backward.
        with mixed_precision(), sdpa_kernel(SDPBackend.MATH):
            noise, levels = batches.noise(clean), batches.noise_levels()
            error, surprise, power = compiled_losses(model, clean, noise, levels, context, states, lengths, roll)
        (error + READING_WEIGHT * surprise + POWER_WEIGHT * power).backward()
        trainer.step(loss=error.detach(), reading=surprise.detach(), power=power.detach())


def export(folder: Path, state: dict[str, dict[str, Tensor]], data: dict[str, Tensor]) -> None:
    """Transformer and condition encoder under their published names, the whitening folded in, in bfloat16."""
    model = SoundModel(data)
    model.load_state_dict(state["model"])
    model.load_state_dict(state["average"], strict=False)
    encoder = model.encoder[0]
    encoder.load_state_dict(state["encoder"])
    with torch.no_grad():
        encoder.text_projector.weight.copy_(model.project.weight @ model.whitening)
        encoder.silence_latent.copy_(silence_latent(data["silence"], encoder.silence_latent.shape[1]))
        encoder.null_condition_emb.zero_()
        model.transformer.condition_embedder.bias -= model.offset()
    model.transformer.to(torch.bfloat16).save_pretrained(folder / "transformer")
    encoder.to(torch.bfloat16).save_pretrained(folder / "condition_encoder")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/tiny-audio"))
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--sounds", type=int, default=12_288)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    file = args.folder / "data.safetensors"
    data = training_data(file, args.folder / "vae/vae", args.folder / "text", args.sounds, args.seed)
    train(args.folder / "audio", data, args.steps, args.batch_size, args.learning_rate, args.seed)


if __name__ == "__main__":
    main()
