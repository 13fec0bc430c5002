"""Trains the image DiT by flow matching on cached latents and text states, with the package's own Z-Image
transformer.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tools.tiny.common.muon import Optimizers
from tools.tiny.common.training import Trainer, mixed_precision
from tools.tiny.image.image_data import TEXT_LENGTH, training_data
from tools.tiny.image.whitening import Whitening
from vllm_omni.models.z_image.config import ZImageConfig
from vllm_omni.models.z_image.transformer import ZImageTransformer
from vllm_omni.worker.diffusion.patches import patchified

CONFIG = dict(
    in_channels=16,
    dim=192,
    n_layers=6,
    n_refiner_layers=1,
    n_heads=6,
    n_kv_heads=6,
    cap_feat_dim=192,
    norm_eps=1e-5,
    qk_norm=True,
    rope_theta=256.0,
    t_scale=1000.0,
    axes_dims=[8, 12, 12],
    axes_lens=[1024, 512, 512],
)
TIME_SHIFT = 3.0
DROPPED_TEXT = 0.08
ANSWER_SHARE = 0.15
PURE_NOISE_SHARE = 0.35
MUON_PREFIXES = ("layers.", "noise_refiner.", "context_refiner.")


def fresh_model() -> ZImageTransformer:
    return ZImageTransformer(ZImageConfig.from_dict(CONFIG))


def initialise(model: ZImageTransformer) -> None:
    """Small random weights; the last layer starts at zero, and every block's gate a little open."""
    model.cap_norm = nn.Identity()  # the training data is whitened instead, see `export`
    for name, parameter in model.named_parameters():
        if "adaLN_modulation" in name or name.startswith("final_layer.linear") or name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.02 if "pad_token" in name else parameter.shape[1] ** -0.5)
    for block in (*model.layers, *model.noise_refiner):
        nn.init.constant_(block.adaLN_modulation.bias[192:384], 0.3)
        nn.init.constant_(block.adaLN_modulation.bias[576:], 0.3)


def whitening_of(data: dict[str, Tensor]) -> Whitening:
    """From the states of a part of the data, padding left out."""
    parts = []
    for kind in ("prompt", "answer"):
        states, lengths = data[f"{kind}_states"][:4000], data[f"{kind}_lengths"][:4000]
        parts.append(states[torch.arange(TEXT_LENGTH) < lengths[:, None]].float())
    return Whitening.of(torch.cat(parts), float(CONFIG["norm_eps"]))


def whitened(data: dict[str, Tensor], whitening: Whitening) -> dict[str, Tensor]:
    """The same data with whitened text states."""
    return {
        name: torch.cat([whitening(part.float()).half() for part in value.split(2000)]) if "states" in name else value
        for name, value in data.items()
    }


class Batches:
    """Random batches of (latents, text states, text lengths)."""

    def __init__(self, data: dict[str, Tensor], size: int, seed: int) -> None:
        self.data, self.size = data, size
        self.generator = torch.Generator().manual_seed(seed)

    def next(self) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.randint(len(self.data["latents"]), (self.size,), generator=self.generator)
        choice = torch.rand(self.size, generator=self.generator)
        is_answer, is_empty = choice < ANSWER_SHARE, choice > 1 - DROPPED_TEXT
        states = torch.where(
            is_answer[:, None, None], self.data["answer_states"][rows], self.data["prompt_states"][rows]
        )
        lengths = torch.where(is_answer, self.data["answer_lengths"][rows], self.data["prompt_lengths"][rows])
        states = torch.where(is_empty[:, None, None], self.data["empty_states"], states)
        lengths = torch.where(is_empty, self.data["empty_lengths"], lengths)
        return self.data["latents"][rows].float(), states.float(), lengths

    def noise_levels(self) -> Tensor:
        """[size] in [0, 1]. Logit-normal, shifted towards noise; a third of them next to pure noise.

        Background and places show in a latent's mean, through almost any noise: only there must the words be read.
        """
        level = torch.randn(self.size, generator=self.generator).sigmoid()
        shifted = TIME_SHIFT * level / (1 + (TIME_SHIFT - 1) * level)
        almost_pure = 1 - 0.08 * torch.rand(self.size, generator=self.generator) ** 2
        return torch.where(torch.rand(self.size, generator=self.generator) < PURE_NOISE_SHARE, almost_pure, shifted)

    def noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator)


def loss(
    model: ZImageTransformer, clean: Tensor, noise: Tensor, level: Tensor, states: Tensor, lengths: Tensor
) -> Tensor:
    """Mean squared error of the velocity (clean minus noise)."""
    noisy = clean + level[:, None, None, None] * (noise - clean)
    is_padding = torch.arange(TEXT_LENGTH) >= lengths[:, None]
    tokens = model.embed(noisy, 1 - level, model.encode_text(states, is_padding))
    patches = model.velocity_patches(model.run_blocks(tokens, 0, len(model.layers)))[0]
    return (patches.float() - patchified(clean - noise)).pow(2).mean()


def train(
    folder: Path, data: dict[str, Tensor], num_steps: int, batch_size: int, learning_rate: float, seed: int
) -> None:
    torch.manual_seed(seed)
    model = fresh_model()
    initialise(model)
    optimizer = Optimizers(model, learning_rate, weight_decay=0.01, matrices=MUON_PREFIXES)
    trainer = Trainer(folder, num_steps, model, optimizer, decay=0.998)
    batches = Batches(whitened(data, whitening_of(data)), batch_size, seed + trainer.run.step)
    compiled_loss = torch.compile(loss)
    while trainer.begin():
        clean, states, lengths = batches.next()
        # Rows are short (96 tokens): plain matrix products are faster than the fused attention's backward.
        with mixed_precision(), sdpa_kernel(SDPBackend.MATH):
            value = compiled_loss(model, clean, batches.noise(clean), batches.noise_levels(), states, lengths)
        value.backward()
        trainer.step(loss=value.detach())


def export(folder: Path, weights: dict[str, Tensor], whitening: Whitening) -> ZImageTransformer2DModel:
    """The averaged weights under their published names, the whitening folded in, in bfloat16."""
    weight, bias = whitening.fold(weights["cap_embedder.weight"], weights["cap_embedder.bias"])
    embedder = {
        "cap_norm.weight": torch.ones(weight.shape[1]),
        "cap_embedder.weight": weight,
        "cap_embedder.bias": bias,
    }
    weights = {**weights, **embedder}
    published = ZImageTransformer2DModel(**CONFIG)
    model = fresh_model()
    state = {}
    for name, tensor in published.state_dict().items():
        target = model.locate(name)
        source = weights[target.parameter]
        state[name] = (source if target.rows is None else source[target.rows]).reshape(tensor.shape)
    published.load_state_dict(state)
    published.to(torch.bfloat16).save_pretrained(folder)
    return published


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/tiny-image"))
    parser.add_argument("--steps", type=int, default=4100)
    parser.add_argument("--pictures", type=int, default=25_600)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    data = training_data(
        args.folder / "data.safetensors", args.folder / "vae/vae", args.folder / "text", args.pictures, args.seed
    )
    train(args.folder / "image", data, args.steps, args.batch_size, args.learning_rate, args.seed)


if __name__ == "__main__":
    main()
