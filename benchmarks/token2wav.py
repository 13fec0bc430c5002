"""Token2wav's transformer alone, from codes to mel spectrograms: its layers in bfloat16 against float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.measure import Options, Table
from benchmarks.sides import SideProcess, duels

COLUMNS = (
    "case",
    "bfloat16, s of sound/s",
    "float32, s of sound/s",
    "bfloat16 / float32",
    "error below the spectrogram",
)
SHIPPED = "asset://tiny-speech"
CODES_PER_S = 50


@dataclass(frozen=True, slots=True)
class Speech:
    """num_points: of the flow."""

    seconds: float
    num_points: int


class Flow:
    """Codes of nothing in particular, in the voice of the folder, the whole of them as one chunk."""

    def __init__(self, folder: str, dtype: str) -> None:
        import torch

        from vllm_omni.models.qwen2_5_omni.token2wav.spec import Token2WavSpec
        from vllm_omni.utils.files import resolve_model_folder
        from vllm_omni.utils.precision import DTYPES

        self._spec = Token2WavSpec(resolve_model_folder(folder))
        self._model = self._spec.load(torch.device("cpu"), DTYPES[dtype])

    def run(self, case: Speech, repeat: int) -> Any:
        """[T, M]."""
        import torch

        from vllm_omni.params import DiffusionParams
        from vllm_omni.payload import StreamChunk

        params = DiffusionParams(seed=repeat, num_inference_steps=case.num_points)
        generator, model = torch.Generator().manual_seed(repeat), self._model
        codes = torch.randint(
            0, self._spec.config.dit.num_embeds - 1, (round(case.seconds * CODES_PER_S),), generator=generator
        )
        with torch.inference_mode():
            voice = model.prepare({}, params, repeat, None)  # type: ignore[arg-type]
            chunk = model.prepare_chunk(voice, StreamChunk(codes, 0, 0, 0, True))
            trajectory = model.trajectory(chunk, params)
            sample, rows = trajectory.noise(generator), list(trajectory.conditions.values())
            for timestep in trajectory.timesteps:
                time = float(timestep)
                frames = model.embed([sample] * len(rows), [time] * len(rows), rows)
                velocities = model.unembed(model.run_blocks(frames, 0, model.num_blocks))
                velocity = trajectory.combine(velocities, time)[None]
                sample = trajectory.sampler.step(velocity, timestep, sample[None], return_dict=False)[0][0]
        return sample.numpy()


def table(folder: str, options: Options) -> tuple[Table, list[dict[str, Any]]]:
    """folder: of a random checkpoint, beside which the shipped one is measured."""
    seconds, points = (0.4, 2) if options.is_quick else (3.0, 10)
    found = []
    for name, target in (("random, of middle size", folder), ("shipped", SHIPPED)):
        with (
            SideProcess("bfloat16", options.threads, Flow, target, "bfloat16") as halves,
            SideProcess("float32", options.threads, Flow, target, "float32") as whole,
        ):
            case = f"{name}: {seconds:g} s"
            found += duels(halves, whole, [(case, seconds, Speech(seconds, points))], error, options)
    cells = [duel.cells() for duel in found]
    return Table("Token2wav's transformer alone", COLUMNS, cells), [duel.figures() for duel in found]


def error(ours: Any, theirs: Any) -> str:
    return f"{10 * np.log10(np.square(theirs).mean() / np.square(ours - theirs).mean()):.0f} dB"
