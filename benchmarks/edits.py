"""Denoising steps of a FLUX.2 and a Qwen-Image of middle size with random weights, made for the suite and thrown away:
pictures from words and edits of pictures, against diffusers' transformers in the same dtype.

A step is one forward pass of all requests. The peer gets its best use: requests of one size and one number of
references in one call, whole requests beside each other where they are unlike. What does not change from step to step
(words, references) is embedded once per request here, and once per step there, as the pipelines have it.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.dit import COLUMNS, largest_difference
from benchmarks.limits import Limits
from benchmarks.measure import Options, Report, Table
from benchmarks.sides import Duel, SideProcess, duels

LATENT_PIXELS = 16  # of a token, along each side
FLUX2: Mapping[str, Any] = {  # 208 M parameters; head size and ratios of the published 4B
    "num_layers": 3,
    "num_single_layers": 8,
    "attention_head_dim": 128,
    "num_attention_heads": 8,
    "joint_attention_dim": 3 * 1024,
    "in_channels": 128,
    "guidance_embeds": False,
}
QWEN_IMAGE: Mapping[str, Any] = {  # 231 M
    "num_layers": 6,
    "attention_head_dim": 128,
    "num_attention_heads": 8,
    "joint_attention_dim": 1024,
    "in_channels": 64,
    "out_channels": 16,
}
QUICK: Mapping[str, Any] = {"num_layers": 1, "num_attention_heads": 2}
NOTE = (
    "Random weights of middle size: speed and equality only. A step is one pass of all requests together; rates count"
    " requests. diffusers rounds timesteps to the model's dtype, and we do not: in bfloat16 that is most of the"
    " difference where several requests stand at unlike times."
)
DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True, slots=True)
class Row:
    """One request."""

    pixels: int  # of a side of what is made
    references: tuple[int, ...] = ()  # pixels of a side of each


@dataclass(frozen=True, slots=True)
class Case:
    rows: tuple[Row, ...]

    def alike(self) -> Iterator[tuple[Row, list[int]]]:
        """The requests that one call of the peer can take."""
        order = sorted(range(len(self.rows)), key=lambda index: (self.rows[index].pixels, self.rows[index].references))
        for row, indices in groupby(order, key=self.rows.__getitem__):
            yield row, list(indices)


CASES: Mapping[str, tuple[Row, ...]] = {
    "1 x 256 px": (Row(256),),
    "4 x 256 px": (Row(256),) * 4,
    "1 x 512 px": (Row(512),),
    "edit, 1 x 256 px, one reference": (Row(256, (256,)),),
    "edits, 4 x 256 px, one reference": (Row(256, (256,)),) * 4,
    "8 unlike: 256 and 384 px, none to two references": (
        *(Row(256), Row(384), Row(256, (256,)), Row(384, (256,))),
        *(Row(256, (384,)), Row(384, (384,)), Row(256, (256, 256)), Row(320)),
    ),
}
CASES_IN_FLOAT32 = ("1 x 256 px", "edit, 1 x 256 px, one reference")
QUICK_CASES = {"2 unlike": (Row(64), Row(32, (32,)))}


class Family(ABC):
    """How a transformer is asked for one step, by us and by diffusers."""

    num_text: int  # tokens of a request's words
    config: Mapping[str, Any]
    channels: int  # of a token's latents

    def __init__(self, is_quick: bool) -> None:
        self.config = {**self.config, **(QUICK if is_quick else {})}

    @abstractmethod
    def peer(self) -> Any:
        """The class of diffusers' transformer."""

    @abstractmethod
    def ours(self, folder: Path, dtype: Any) -> Any:
        """Our transformer, its checkpoint read."""

    @abstractmethod
    def latents(self, pixels: int, seed: int) -> Any:
        """float32, of one picture, as our transformer takes them."""

    @abstractmethod
    def condition(self, model: Any, text: Any, references: Sequence[Any]) -> Any:
        """What a row of ours is drawn after; made once per request."""

    @abstractmethod
    def ask(self, model: Any, latents: Any, times: Any, text: Any, references: Sequence[Any]) -> Any:
        """One call of the peer for rows that are alike: [rows, C, h, w], [rows] in 0 to 1, [rows, T, J], and of each
        reference [rows, C, h, w] -> [rows, C, h, w].
        """

    def texts(self, count: int) -> Any:
        import torch

        generator = torch.Generator().manual_seed(0)
        return torch.randn(count, self.num_text, self.config["joint_attention_dim"], generator=generator)


class Flux2(Family):
    num_text, config = 512, FLUX2  # words are padded to so many, and the padding is attended to

    def peer(self) -> Any:
        from diffusers import Flux2Transformer2DModel

        return Flux2Transformer2DModel

    def ours(self, folder: Path, dtype: Any) -> Any:
        import torch

        from vllm_omni.models.flux2.config import Flux2Config
        from vllm_omni.models.flux2.transformer import Flux2Transformer

        with torch.device("meta"):
            model = Flux2Transformer(Flux2Config.from_folder(folder))
        return _loaded(model, folder, dtype)

    def latents(self, pixels: int, seed: int) -> Any:
        return _noise(self.config["in_channels"], pixels // LATENT_PIXELS, seed)

    def condition(self, model: Any, text: Any, references: Sequence[Any]) -> Any:
        from vllm_omni.models.flux2.transformer import Condition

        return Condition(model.embed_text(text), tuple(model.embed_reference(one) for one in references))

    def ask(self, model: Any, latents: Any, times: Any, text: Any, references: Sequence[Any]) -> Any:
        import torch

        pictures = [latents, *references]
        tokens = torch.cat([picture.flatten(2).transpose(1, 2) for picture in pictures], dim=1)
        places = torch.cat([_places(10 * index, *picture.shape[2:]) for index, picture in enumerate(pictures)])
        words = torch.zeros(text.shape[1], 4, dtype=torch.long)
        words[:, 3] = torch.arange(text.shape[1])
        found = model(
            hidden_states=tokens,
            encoder_hidden_states=text,
            timestep=times,
            img_ids=places,
            txt_ids=words,
            return_dict=False,
        )[0]
        height, width = latents.shape[2:]
        return found[:, : height * width].transpose(1, 2).unflatten(2, (height, width))


class QwenImage(Family):
    num_text, config = 64, QWEN_IMAGE

    def peer(self) -> Any:
        from diffusers import QwenImageTransformer2DModel

        return QwenImageTransformer2DModel

    def ours(self, folder: Path, dtype: Any) -> Any:
        import torch

        from vllm_omni.models.qwen_image.config import QwenImageConfig
        from vllm_omni.models.qwen_image.transformer import QwenImageTransformer

        with torch.device("meta"):
            model = QwenImageTransformer(QwenImageConfig.from_folder(folder))
        return _loaded(model, folder, dtype)

    def latents(self, pixels: int, seed: int) -> Any:
        return _noise(self.config["out_channels"], 2 * pixels // LATENT_PIXELS, seed)

    def condition(self, model: Any, text: Any, references: Sequence[Any]) -> Any:
        from vllm_omni.models.qwen_image.transformer import Context, grid_of

        grids = tuple(grid_of(reference) for reference in references)
        return Context(model.encode_text(text), model.encode_references(references), grids)

    def ask(self, model: Any, latents: Any, times: Any, text: Any, references: Sequence[Any]) -> Any:
        import torch

        pictures = [latents, *references]
        tokens = torch.cat([_two_by_two(picture) for picture in pictures], dim=1)
        shapes = [(1, picture.shape[2] // 2, picture.shape[3] // 2) for picture in pictures]
        found = model(
            hidden_states=tokens,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=torch.ones(text.shape[:2], dtype=torch.bool),
            timestep=times,
            img_shapes=[shapes] * len(latents),
            return_dict=False,
        )[0]
        _, height, width = shapes[0]
        grid = found[:, : height * width].unflatten(2, (-1, 2, 2)).unflatten(1, (height, width))
        return grid.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


FAMILIES: Mapping[str, type[Family]] = {"FLUX.2": Flux2, "Qwen-Image": QwenImage}


class Weights:
    """Writes the random checkpoint, in a process of its own."""

    def write(self, name: str, folder: str, is_quick: bool) -> None:
        import torch

        from benchmarks.random_weights import write_weights

        family = FAMILIES[name](is_quick)
        with torch.device("meta"):
            model = family.peer()(**family.config)
        model.save_config(folder)
        write_weights(model, Path(folder) / "diffusion_pytorch_model.safetensors")


class Side:
    """What both sides are given."""

    def __init__(self, name: str, folder: str, dtype: str, is_quick: bool) -> None:
        from vllm_omni.utils.precision import DTYPES as BY_NAME

        self._family, self._dtype = FAMILIES[name](is_quick), BY_NAME[dtype]
        self._folder = Path(folder)

    def given(self, case: Case, repeat: int) -> tuple[list[Any], Any, list[list[Any]]]:
        """Latents, texts and references of each row."""
        seeds = [100 * repeat + index for index in range(len(case.rows))]
        latents = [self._family.latents(row.pixels, seed) for row, seed in zip(case.rows, seeds, strict=True)]
        references = [
            [self._family.latents(side, index) for index, side in enumerate(row.references)] for row in case.rows
        ]
        return latents, self._family.texts(len(case.rows)), references

    def times(self, count: int) -> Any:
        import torch

        return torch.linspace(0.25, 0.75, count)


class Ours(Side):
    def __init__(self, name: str, folder: str, dtype: str, is_quick: bool) -> None:
        super().__init__(name, folder, dtype, is_quick)
        self._model = self._family.ours(self._folder, self._dtype)
        self._conditions: dict[Case, list[Any]] = {}

    def run(self, case: Case, repeat: int) -> list[np.ndarray]:
        import torch

        latents, texts, references = self.given(case, repeat)
        with torch.inference_mode():
            if case not in self._conditions:
                pairs = zip(texts, references, strict=True)
                self._conditions[case] = [self._family.condition(self._model, *pair) for pair in pairs]
            tokens = self._model.embed(latents, self.times(len(latents)) * 1000, self._conditions[case])
            tokens = self._model.run_blocks(tokens, 0, num_blocks(self._family.config))
            return [velocity.float().numpy() for velocity in self._model.unembed(tokens)]


class Diffusers(Side):
    def __init__(self, name: str, folder: str, dtype: str, is_quick: bool) -> None:
        from diffusers.utils import logging

        super().__init__(name, folder, dtype, is_quick)
        logging.set_verbosity_error()
        self._model = self._family.peer().from_pretrained(folder, dtype=self._dtype, low_cpu_mem_usage=False).eval()

    def run(self, case: Case, repeat: int) -> list[np.ndarray]:
        import torch

        latents, texts, references = self.given(case, repeat)
        times, found = self.times(len(latents)).to(self._dtype), dict[int, np.ndarray]()
        with torch.inference_mode():
            for row, indices in case.alike():
                pictures = torch.stack([latents[index] for index in indices]).to(self._dtype)
                seen = [
                    torch.stack([references[index][number] for index in indices])
                    for number in range(len(row.references))
                ]
                made = self._family.ask(
                    self._model,
                    pictures,
                    times[indices],
                    texts[indices].to(self._dtype),
                    [each.to(self._dtype) for each in seen],
                )
                found |= dict(zip(indices, made.float().numpy(), strict=True))
        return [found[index] for index in range(len(latents))]


def run(options: Options, limits: Limits | None = None) -> Report:
    tables, found = [], []
    for name in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            with SideProcess("weights", options.threads, Weights) as writer:
                writer.call("write", name, folder, options.is_quick)
            for dtype in DTYPES:
                rows = contest(name, folder, dtype, options)
                tables.append(Table(f"Denoising steps, {name}, {dtype}", COLUMNS, [duel.cells() for duel in rows]))
                found += [{"family": name, "dtype": dtype, **duel.figures()} for duel in rows]
    return Report("edits", tables, [NOTE], {"duels": found})


def contest(family: str, folder: str, dtype: str, options: Options) -> list[Duel]:
    names = CASES if dtype == "bfloat16" else CASES_IN_FLOAT32
    cases = QUICK_CASES if options.is_quick else {name: CASES[name] for name in names}
    asked = [(words, len(rows), Case(rows)) for words, rows in cases.items()]
    with ExitStack() as stack:
        us = stack.enter_context(
            SideProcess("vllm_omni", options.threads, Ours, family, folder, dtype, options.is_quick)
        )
        peer = stack.enter_context(
            SideProcess("diffusers", options.threads, Diffusers, family, folder, dtype, options.is_quick)
        )
        return duels(us, peer, asked, largest_difference, options)


def _loaded(model: Any, folder: Path, dtype: Any) -> Any:
    """A model on the meta device, its weights read."""
    import torch

    from vllm_omni.layers.weights import allocate, load_weights

    allocate(model, torch.device("cpu"), dtype, None)
    load_weights(model, folder)
    return model


def num_blocks(config: Mapping[str, Any]) -> int:
    return int(config["num_layers"]) + int(config.get("num_single_layers", 0))


def _noise(channels: int, side: int, seed: int) -> Any:
    import torch

    return torch.randn(channels, side, side, generator=torch.Generator().manual_seed(seed))


def _places(time: int, height: int, width: int) -> Any:
    """[h * w, 4]: time, height, width, place in the text."""
    import torch

    axes = (torch.tensor([time]), torch.arange(height), torch.arange(width), torch.tensor([0]))
    return torch.cartesian_prod(*axes)


def _two_by_two(latents: Any) -> Any:
    """[rows, C, h, w] -> [rows, h / 2 * w / 2, 4 C], channels outermost."""
    grid = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
