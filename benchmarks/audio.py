"""Seconds of sound per second: requests of mixed durations through the ACE-Step graph, against diffusers' pipeline.

Both run one checkpoint of middle size with random weights (the turbo kind, no guidance), made for the suite and thrown
away. The peer is called once per request, since one call of it has one duration; we get all requests at once. A second
table runs us with a step cache: what it replays is a matter of the weights, so with random ones it only shows the
cost and the gain of replaying, not what a trained model allows.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import numpy as np

from benchmarks.limits import Limits
from benchmarks.measure import Options, Report, Table
from benchmarks.sides import Duel, SideProcess, duels

CONFIG = "ace_step"
STAGE = "music"
TEXT_FOLDER = "asset://tiny-image"
DURATIONS_S = (6, 2, 10, 3, 8, 4, 9, 5)
COUNTS = (1, 4, 16)
WORDS = ("slow", "bright", "piano", "drums", "strings", "a walking bass", "rain", "a choir", "brass", "a quiet guitar")
COLUMNS = ("case", "ours, s of sound/s", "diffusers, s of sound/s", "ours / diffusers", "largest difference")
CHANNELS = 16


@dataclass(frozen=True, slots=True)
class Size:
    """Of the random checkpoint. decoder: channels of the autoencoder's last block; strides: those of its blocks."""

    hidden: int
    layers: int
    decoder: int
    strides: tuple[int, ...]
    sample_rate: int


MIDDLE = Size(hidden=512, layers=8, decoder=16, strides=(2, 4, 4, 6, 10), sample_rate=48_000)
TINY = Size(hidden=64, layers=2, decoder=8, strides=(8, 8), sample_rate=1_600)


@dataclass(frozen=True, slots=True)
class Case:
    """durations_s: of each request, whole seconds."""

    durations_s: tuple[int, ...]
    steps: int

    def prompts(self, repeat: int) -> list[str]:
        rng = random.Random(repeat)
        return [", ".join(rng.sample(WORDS, 3)) for _ in self.durations_s]

    def seeds(self, repeat: int) -> list[int]:
        return [1000 * repeat + index for index in range(len(self.durations_s))]


class Weights:
    """Writes the random checkpoint, in a process of its own that leaves no trace in the memory of the sides."""

    def write(self, folder: str, size: Size) -> None:
        import torch
        from diffusers import AceStepPipeline, FlowMatchEulerDiscreteScheduler
        from transformers import PreTrainedTokenizerFast, Qwen3Model

        from vllm_omni.utils.files import resolve_model_folder

        _draw_no_progress_bars()
        torch.manual_seed(0)
        text = resolve_model_folder(TEXT_FOLDER)
        text_encoder = Qwen3Model.from_pretrained(text / "text_encoder", dtype=torch.float32)
        AceStepPipeline(
            vae=_random_vae(size),
            text_encoder=text_encoder,
            tokenizer=PreTrainedTokenizerFast.from_pretrained(text / "tokenizer"),
            transformer=_random_transformer(size),
            condition_encoder=_random_condition_encoder(size, text_encoder.config.hidden_size),
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
        ).save_pretrained(folder)


class Ours:
    """All requests in one call of Omni.generate. policy: of the step cache."""

    def __init__(self, folder: str, dtype: str, policy: str) -> None:
        from vllm_omni import Omni

        overrides = [f"{STAGE}.cache={{policy: {policy}}}"]
        self._omni = Omni(CONFIG, model=folder, overrides=overrides, device="cpu", dtype=dtype, progress=False)
        self._share_replayed = 0.0

    def run(self, case: Case, repeat: int) -> list[np.ndarray]:
        from vllm_omni import DiffusionParams

        prompts = [
            {"prompt": words, "duration_s": float(duration_s)}
            for words, duration_s in zip(case.prompts(repeat), case.durations_s, strict=True)
        ]
        params = [DiffusionParams(seed=seed, num_inference_steps=case.steps) for seed in case.seeds(repeat)]
        outputs = self._omni.generate(prompts, params)
        for output in outputs:
            if output.error is not None:
                raise output.error
        replayed = sum(output.metrics[STAGE]["cache_hits"] for output in outputs)
        self._share_replayed = replayed / (case.steps * len(outputs))
        return [output.audios[0].samples for output in outputs]

    def share_replayed(self) -> float:
        """Of the steps of the last run, those that the step cache served."""
        return self._share_replayed


class Diffusers:
    """One call for each request."""

    def __init__(self, folder: str, dtype: str) -> None:
        import torch
        from diffusers import AceStepPipeline

        from vllm_omni.utils.precision import DTYPES

        _draw_no_progress_bars()
        self._generator = torch.Generator
        self._pipeline = AceStepPipeline.from_pretrained(folder, dtype=DTYPES[dtype])
        self._pipeline.set_progress_bar_config(disable=True)

    def run(self, case: Case, repeat: int) -> list[np.ndarray]:
        requests = zip(case.prompts(repeat), case.durations_s, case.seeds(repeat), strict=True)
        return [
            self._pipeline(
                prompt=words,
                audio_duration=float(duration_s),
                guidance_scale=1.0,
                num_inference_steps=case.steps,
                generator=self._generator().manual_seed(seed),
            )
            .audios[0]
            .float()
            .numpy()
            for words, duration_s, seed in requests
        ]


def run(options: Options, limits: Limits | None = None) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        with SideProcess("weights", options.threads, Weights) as writer:
            writer.call("write", folder, TINY if options.is_quick else MIDDLE)
        with SideProcess("diffusers", options.threads, Diffusers, folder, options.dtype) as peer:
            with SideProcess("vllm_omni", options.threads, Ours, folder, options.dtype, "none") as us:
                plain = duels(us, peer, cases(options), largest_difference, options)
                memory = [["vllm_omni", f"{us.peak_memory_mb():.0f}"], ["diffusers", f"{peer.peak_memory_mb():.0f}"]]
            with SideProcess("vllm_omni", options.threads, Ours, folder, options.dtype, "first_block") as us:
                cached = cached_duels(us, peer, options)
                memory.append(["vllm_omni, first_block", f"{us.peak_memory_mb():.0f}"])
    return Report(
        "audio",
        [
            Table(f"Seconds of sound per second, {options.dtype}", COLUMNS, [duel.cells() for duel in plain]),
            Table("With the step cache first_block", (*COLUMNS[:-1], "steps replayed"), [d.cells() for d in cached]),
            Table("Peak memory, MiB", ("side", "after all cases"), memory),
        ],
        notes=["Random weights of middle size: speed and equality only. The peer runs the same requests one by one."],
        figures={
            "duels": [duel.figures() for duel in plain],
            "cached": [duel.figures() for duel in cached],
            "peak_memory_mb": memory,
        },
    )


def cached_duels(us: SideProcess, peer: SideProcess, options: Options) -> list[Duel]:
    """The same cases with a step cache; what was replayed stands where the difference stands without one."""
    found = []
    for name, amount, case in cases(options):
        (duel,) = duels(us, peer, [(name, amount, case)], lambda ours, theirs: "", options)
        duel.agreement = f"{us.call('share_replayed')[1]:.0%}"
        found.append(duel)
    return found


def cases(options: Options) -> list[tuple[str, int, Case]]:
    """(name, seconds of sound, case) of everything that is measured."""
    steps = 2 if options.is_quick else 8
    found = []
    for count in (2,) if options.is_quick else COUNTS:
        durations = tuple(islice(cycle(DURATIONS_S), count))
        found.append((f"{count} x {_range(durations)} s, {steps} steps", sum(durations), Case(durations, steps)))
    return found


def largest_difference(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> str:
    """Over all sounds, of each one's own peak."""
    pairs = zip(ours, theirs, strict=True)
    return f"{max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs):.1e} of the peak"


def _range(durations: Sequence[int]) -> str:
    low, high = min(durations), max(durations)
    return str(low) if low == high else f"{low}-{high}"


def _draw_no_progress_bars() -> None:
    from diffusers.utils import logging
    from transformers.utils import logging as text_logging

    logging.disable_progress_bar()
    text_logging.disable_progress_bar()


def _random_transformer(size: Size) -> Any:
    from diffusers import AceStepTransformer1DModel

    return AceStepTransformer1DModel(
        hidden_size=size.hidden,
        intermediate_size=3 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 32,
        num_key_value_heads=size.hidden // 64,
        head_dim=32,
        in_channels=3 * CHANNELS,
        audio_acoustic_hidden_dim=CHANNELS,
        encoder_hidden_size=size.hidden,
        is_turbo=True,
        model_version="turbo",
    )


def _random_condition_encoder(size: Size, text_width: int) -> Any:
    from diffusers.pipelines.ace_step import AceStepConditionEncoder

    return AceStepConditionEncoder(
        hidden_size=size.hidden,
        intermediate_size=3 * size.hidden,
        text_hidden_dim=text_width,
        timbre_hidden_dim=CHANNELS,
        num_lyric_encoder_hidden_layers=2,
        num_timbre_encoder_hidden_layers=2,
        num_attention_heads=size.hidden // 32,
        num_key_value_heads=size.hidden // 64,
        head_dim=32,
    )


def _random_vae(size: Size) -> Any:
    from diffusers import AutoencoderOobleck

    return AutoencoderOobleck(
        encoder_hidden_size=2 * CHANNELS,
        downsampling_ratios=list(size.strides),
        channel_multiples=[1, 2, 4, 8, 16][: len(size.strides)],
        decoder_channels=size.decoder,
        decoder_input_channels=CHANNELS,
        audio_channels=2,
        sampling_rate=size.sample_rate,
    )
