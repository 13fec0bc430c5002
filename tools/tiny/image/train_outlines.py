"""Trains the LoRA that ships beside the tiny image model: it draws outlines by hand instead of filled shapes.

    python -m tools.tiny.image.train_outlines      # about half an hour on one core

The model stays as it is; what is trained are two thin matrices beside every projection within its blocks, written in
diffusers' naming.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.hooks import RemovableHandle
from tqdm import trange

from tools.tiny.common.training import learning_rate_factor, mixed_precision
from tools.tiny.image.image_data import TextStates, encode_pictures
from tools.tiny.image.outlines import draw_outlines
from tools.tiny.image.train_image import PURE_NOISE_SHARE, TIME_SHIFT, fresh_model, loss
from tools.tiny.image.world import Scene, canonical, sample_scene
from vllm_omni.models.z_image.transformer import ZImageTransformer

RANK = 5
BLOCKS = ("layers.", "noise_refiner.")
PARTS = (".attention.", ".feed_forward.")


class Projection(nn.Module):
    """The two matrices of one published projection, which is some rows of a layer of ours."""

    def __init__(self, num_inputs: int, rows: slice) -> None:
        super().__init__()
        self.rows = rows
        self.down = nn.Parameter(torch.randn(RANK, num_inputs) * num_inputs**-0.5)
        self.up = nn.Parameter(torch.zeros(rows.stop - rows.start, RANK))

    def add_to(self, output: Tensor, x: Tensor) -> Tensor:
        change = (x @ self.down.T.to(x.dtype)) @ self.up.T.to(x.dtype)
        missing = (self.rows.start, output.shape[-1] - self.rows.stop)
        return output + nn.functional.pad(change, missing)


class Adapter(nn.Module):
    """All projections, hooked to the layers of a model."""

    def __init__(self, model: ZImageTransformer, published: Sequence[str]) -> None:
        super().__init__()
        self.projections: dict[str, Projection] = {}
        self.handles: list[RemovableHandle] = []
        for name in published:
            target = model.locate(name)
            assert target is not None
            layer = model.get_submodule(target.parameter.removesuffix(".weight"))
            assert isinstance(layer, nn.Linear)
            rows = slice(0, layer.out_features) if target.rows is None else target.rows
            projection = self.projections[name.removesuffix(".weight")] = Projection(layer.in_features, rows)
            self.handles.append(
                layer.register_forward_hook(lambda _, given, out, p=projection: p.add_to(out, given[0]))
            )
        self.parts = nn.ModuleList(self.projections.values())

    def published_weights(self) -> dict[str, Tensor]:
        """In diffusers' naming, in bfloat16."""
        found = {}
        for name, projection in self.projections.items():
            found[f"transformer.{name}.lora_A.weight"] = projection.down.detach().bfloat16().contiguous()
            found[f"transformer.{name}.lora_B.weight"] = projection.up.detach().bfloat16().contiguous()
        return found


def frozen_model(folder: Path) -> tuple[ZImageTransformer, list[str]]:
    """The transformer of a diffusers folder with plain weights that stand still, and the published names of what is
    adapted.
    """
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    model = fresh_model()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in weights.items():
            target = model.locate(name)
            assert target is not None
            parameter = parameters[target.parameter]
            place = parameter if target.rows is None else parameter[target.rows]
            place.copy_(tensor.reshape(place.shape))
    names = [
        name
        for name in ZImageTransformer2DModel.from_pretrained(folder, low_cpu_mem_usage=False).state_dict()
        if name.startswith(BLOCKS) and any(part in name for part in PARTS) and ".norm_" not in name
    ]
    return model.requires_grad_(False), names


def scenes(count: int, rng: random.Random) -> list[Scene]:
    """Of the training world, without rings, which are outlines already."""
    found: list[Scene] = []
    while len(found) < count:
        scene = sample_scene(rng)
        if all(thing.shape != "ring" for thing in scene.things):
            found.append(scene)
    return found


def drawings(asset: Path, count: int, seed: int) -> dict[str, Tensor]:
    """Latents of outlines, and the states of the words of each."""
    rng, states = random.Random(seed), TextStates(asset)
    vae = AutoencoderKL.from_pretrained(asset / "vae", low_cpu_mem_usage=False)
    vae = vae.to(memory_format=torch.channels_last)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in trange(count // 32, desc="drawings", mininterval=10):
        batch = scenes(32, rng)
        latents = encode_pictures(vae, [draw_outlines(scene, rng) for scene in batch])
        parts.append((latents, *states.prompts([canonical(scene) for scene in batch])))
    latents, texts, lengths = (torch.cat(part) for part in zip(*parts, strict=True))
    return {"latents": latents, "states": texts, "lengths": lengths}


def noise_levels(count: int, generator: torch.Generator) -> Tensor:
    """[count] in [0, 1], as the model itself was trained."""
    level = torch.randn(count, generator=generator).sigmoid()
    shifted = TIME_SHIFT * level / (1 + (TIME_SHIFT - 1) * level)
    almost_pure = 1 - 0.08 * torch.rand(count, generator=generator) ** 2
    return torch.where(torch.rand(count, generator=generator) < PURE_NOISE_SHARE, almost_pure, shifted)


def train(adapter: Adapter, model: ZImageTransformer, data: dict[str, Tensor], args: argparse.Namespace) -> None:
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(args.seed)
    for step in (progress := trange(args.steps, desc="training", mininterval=10)):
        optimizer.param_groups[0]["lr"] = args.learning_rate * learning_rate_factor(step, args.steps)
        rows = torch.randint(len(data["latents"]), (args.batch_size,), generator=generator)
        clean = data["latents"][rows]
        noise = torch.randn(clean.shape, generator=generator)
        levels = noise_levels(args.batch_size, generator)
        with mixed_precision(), sdpa_kernel(SDPBackend.MATH):
            value = loss(model, clean, noise, levels, data["states"][rows], data["lengths"][rows])
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        progress.set_postfix(loss=f"{value.item():.4f}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--asset", type=Path, default=Path("vllm_omni/assets/tiny-image"))
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("vllm_omni/assets/tiny-image/lora/outlines.safetensors")
    )
    parser.add_argument("--pictures", type=int, default=12800)
    parser.add_argument("--steps", type=int, default=5500)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    torch.manual_seed(args.seed)
    model, names = frozen_model(args.asset / "transformer")
    adapter = Adapter(model, names)
    train(adapter, model, drawings(args.asset, args.pictures, args.seed), args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save_file(adapter.published_weights(), args.output, {"rank": str(RANK), "trained_on": "tiny-image"})
    print(f"wrote {args.output}: {args.output.stat().st_size / 1000:.0f} kB, {len(names)} projections")


if __name__ == "__main__":
    main()
