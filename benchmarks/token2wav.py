"""Token2wav's transformer alone: one evaluation of the published width and depth against transformers', and what its
layers lose in bfloat16 on the way from codes to a mel spectrogram.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.measure import Options, Table, with_spread
from benchmarks.sides import Duel, SideProcess, duels, rounds, tell

COLUMNS = ("case", "bfloat16, s of sound/s", "float32, s of sound/s", "bfloat16 / float32", "error below spectrogram")
OURS, PEERS = "bfloat16", ("our float32", "transformers in float32", "transformers in bfloat16")
SHIPPED = "asset://tiny-speech"
CODES_PER_S, FRAMES_OF_CODE, MEL_BINS = 50, 2, 80
CHUNKS = (16, 87, 237)  # codes that a chunk computes: of the first second's, and of a long answer
TIMESTEP = 0.5


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

        spec = Token2WavSpec(resolve_model_folder(folder))
        self._num_codes = spec.config.dit.num_embeds - 1
        self._model = spec.load(torch.device("cpu"), DTYPES[dtype])

    def run(self, case: Speech, repeat: int) -> Any:
        """[T, M]."""
        import torch

        with torch.inference_mode():
            trajectory = self._trajectory(round(case.seconds * CODES_PER_S), case.num_points, repeat)
            sample = trajectory.noise(torch.Generator().manual_seed(repeat))
            for timestep in trajectory.timesteps:
                velocity = trajectory.combine(self._velocities(sample, float(timestep), trajectory), float(timestep))
                sample = trajectory.sampler.step(velocity[None], timestep, sample[None], return_dict=False)[0][0]
        return sample.numpy()

    def _trajectory(self, num_codes: int, num_points: int, seed: int) -> Any:
        from vllm_omni.params import DiffusionParams
        from vllm_omni.payload import StreamChunk

        params = DiffusionParams(seed=seed, num_inference_steps=num_points)
        voice = self._model.prepare({}, params, seed, None)  # type: ignore[arg-type]
        codes = drawn_codes(num_codes, self._num_codes, seed)
        return self._model.trajectory(self._model.prepare_chunk(voice, StreamChunk(codes, 0, 0, 0, True)), params)

    def _velocities(self, sample: Any, time: float, trajectory: Any) -> list[Any]:
        """Guided and unguided."""
        model, rows = self._model, list(trajectory.conditions.values())
        frames = model.embed([sample] * len(rows), [time] * len(rows), rows)
        return model.unembed(model.run_blocks(frames, 0, model.num_blocks))


class Evaluation(Flow):
    """Of one chunk, guided and unguided."""

    def run(self, case: int, repeat: int) -> Any:  # type: ignore[override]
        """[2, T, M]."""
        import torch

        with torch.inference_mode():
            velocities = self._velocities(drawn_sample(case, repeat), TIMESTEP, self._trajectory(case, 2, repeat))
        return torch.stack(velocities).numpy()


class Transformers:
    """The same by the reference implementation."""

    def __init__(self, folder: str, dtype: str) -> None:
        import torch
        from transformers import Qwen2_5OmniForConditionalGeneration

        from vllm_omni.utils.precision import DTYPES

        model = Qwen2_5OmniForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self._voice = next(iter(model.speaker_map.values()))
        self._dtype = DTYPES[dtype]
        self._transformer = model.token2wav.code2wav_dit_model.to(self._dtype)

    def run(self, case: int, repeat: int) -> Any:
        import torch

        cond, mel = (self._voice[name].to(self._dtype) for name in ("cond", "ref_mel"))
        sample = drawn_sample(case, repeat).to(self._dtype)[None]
        with torch.inference_mode():
            found = self._transformer(
                hidden_states=sample,
                speaker_embedding=cond[:, None].repeat(1, sample.shape[1], 1),
                condition_vector=mel,
                quantized_code=drawn_codes(case, self._transformer.config.num_embeds - 1, repeat)[None],
                time_step=torch.tensor(TIMESTEP, dtype=self._dtype),
            )
        return found.float().numpy()


def drawn_codes(count: int, num_codes: int, seed: int) -> Any:
    import torch

    return torch.randint(0, num_codes, (count,), generator=torch.Generator().manual_seed(seed))


def drawn_sample(num_codes: int, seed: int) -> Any:
    import torch

    return torch.randn(num_codes * FRAMES_OF_CODE, MEL_BINS, generator=torch.Generator().manual_seed(seed))


def evaluations(folder: str, options: Options) -> tuple[Table, list[dict[str, Any]]]:
    """folder: of a random checkpoint of the published width and depth."""
    chunks = CHUNKS[:1] if options.is_quick else CHUNKS
    cases = [(f"{count} codes", 1.0, count) for count in chunks]
    rows: list[list[str]] = []
    found: list[Duel] = []
    with (
        SideProcess(OURS, options.threads, Evaluation, folder, "bfloat16") as us,
        SideProcess(PEERS[0], options.threads, Evaluation, folder, "float32") as whole,
        SideProcess(PEERS[1], options.threads, Transformers, folder, "float32") as theirs,
        SideProcess(PEERS[2], options.threads, Transformers, folder, "bfloat16") as theirs_in_halves,
    ):
        for row in rounds(us, [whole, theirs, theirs_in_halves], cases, error, options):
            tell(PEERS, row)
            rows.append(
                [row[0].case, with_spread(row[0].us_s, 3), *(f"{with_spread(d.ratios)}, {d.agreement}" for d in row)]
            )
            found += row
    columns = ("a chunk of", "bfloat16, s", *(f"times {peer}, distance" for peer in PEERS))
    return Table("One evaluation of token2wav's transformer", columns, rows), [duel.figures() for duel in found]


def flows(folder: str, options: Options) -> tuple[Table, list[dict[str, Any]]]:
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
    return Table("Token2wav's transformer from codes to spectrograms", COLUMNS, cells), [
        duel.figures() for duel in found
    ]


def error(ours: Any, theirs: Any) -> str:
    return f"{10 * np.log10(np.square(theirs).mean() / np.square(ours - theirs).mean()):.0f} dB"
