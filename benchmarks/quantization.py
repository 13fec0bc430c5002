"""What `quantization: int8` costs and gives, against the same package without: tokens per second, pictures, memory; how
well the shipped models do what they are judged by; how far a random Z-Image of middle size is from itself.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_shapes import TINY_QWEN3, TINY_VAE, TINY_Z_IMAGE, Z_IMAGE
from benchmarks.limits import Limits, decode_parameters
from benchmarks.measure import Options, Report, Table
from benchmarks.sides import SideProcess, duels
from benchmarks.text import LARGE, SMALL, TINY, Case, ModelMaker, Ours, equal_share, pool_of

QUANTIZATIONS = ("int8", "none")
MIDDLE_Z_IMAGE = {**Z_IMAGE, "dim": 768, "n_layers": 24, "n_heads": 6, "n_kv_heads": 6, "cap_feat_dim": 32}
# The stages of each shipped config that can hold int8
STAGES = {
    "tiny_image.yaml": ("text", "image"),
    "tiny_scene.yaml": ("writer", "image"),
    "tiny_audio.yaml": ("text", "sound"),
}
SEED = 1000
TOP_LOGPROBS = 20
UNLIKELY = -12.0  # for a token that is not among those


class Text(Ours):
    """All requests in one call, with weights of one kind."""

    def __init__(self, folder: str, dtype: str, pool: Sequence[str], quantization: str) -> None:
        super().__init__(folder, dtype, [*pool, f"text.quantization={quantization}"])


@dataclass(frozen=True, slots=True)
class Pictures:
    """So many of one size at once."""

    count: int
    pixels: int
    steps: int


class Drawing:
    """The random Z-Image."""

    def __init__(self, folder: str, quantization: str, dtype: str = "bfloat16") -> None:
        from vllm_omni import Omni

        overrides = [f"image.quantization={quantization}", "text.dtype=float32"]
        self._omni = Omni("z_image", model=folder, device="cpu", dtype=dtype, overrides=overrides, progress=False)

    def run(self, case: Pictures, repeat: int) -> list[Any]:
        """The pixels of each, uint8."""
        import numpy as np

        from vllm_omni import DiffusionParams

        shape = {"height": case.pixels, "width": case.pixels, "num_inference_steps": case.steps, "guidance_scale": 0.0}
        params = [DiffusionParams(seed=repeat * case.count + index, **shape) for index in range(case.count)]  # type: ignore[arg-type]
        outputs = self._omni.generate(["a red circle"] * case.count, params)
        for output in outputs:
            if output.error is not None:
                raise output.error
        return [np.asarray(output.images[0]) for output in outputs]


class Judged:
    """The shipped models, asked what they never saw in training."""

    def __init__(self, quantization: str) -> None:
        self._quantization = quantization

    def shares(self, config: str, count: int) -> dict[str, float]:
        """Kind of request to a shipped config -> the share that was right."""
        from tools.tiny.audio import evaluate as audio
        from tools.tiny.image import evaluate as image

        with self._opened(config) as omni:
            if config == "tiny_audio.yaml":
                return {f"sounds: {c.name}": audio.judge_case(omni, c, count, SEED, {})[0].all for c in audio.CASES}
            cases = [case for case in image.CASES if case.is_loose == (config == "tiny_scene.yaml")]
            return {f"pictures: {c.name}": image.judge_case(omni, c, count, SEED, {})[0] for c in cases}

    def _opened(self, config: str) -> Any:
        from vllm_omni import Omni

        return Omni(config, overrides=[f"{stage}.quantization={self._quantization}" for stage in STAGES[config]])


class Writer(Text):
    """The shipped language model that puts loose words plainly."""

    def __init__(self, quantization: str) -> None:
        super().__init__(TINY, "float32", [], quantization)

    def answers(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Greedy, to their end."""
        from vllm_omni import SamplingParams

        outputs = self._omni.generate(
            [{"prompt_token_ids": ids} for ids in prompts], SamplingParams(temperature=0.0, max_tokens=48)
        )
        return [list(output.token_ids or ()) for output in outputs]

    def loss(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> float:
        """Nats for each token of these answers."""
        from vllm_omni import SamplingParams

        pairs = zip(prompts, answers, strict=True)
        asked = [([*prompt, *answer[:at]], answer[at]) for prompt, answer in pairs for at in range(len(answer))]
        params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=TOP_LOGPROBS, ignore_eos=True)
        outputs = self._omni.generate([{"prompt_token_ids": ids} for ids, _ in asked], params)
        found = []
        for output, (_, token) in zip(outputs, asked, strict=True):
            if output.error is not None or not output.logprobs:
                raise output.error or RuntimeError("no log probabilities")
            found.append(output.logprobs[0].get(token, UNLIKELY))
        return -sum(found) / len(found)


def run(options: Options, limits: Limits | None = None) -> Report:
    with tempfile.TemporaryDirectory() as temporary:
        speed, memory = _speed(Path(temporary), options)
        drawn, distances = _drawing(Path(temporary), options)
    judged, figures = _judged(options)
    columns = ("case", "int8, a second", "bfloat16, a second", "int8 / bfloat16")
    return Report(
        "quantization",
        [
            Table("Tokens written and pictures drawn per second, int8 against none", columns, speed + drawn),
            Table("Peak memory, MiB", ("", "int8", "none"), memory),
            Table("Right of what the shipped models are asked", ("", "int8", "none"), judged),
            Table("A random Z-Image of middle size against itself", ("", "peak signal to noise"), distances),
        ],
        notes=["In int8: projections of attention and MLP in the blocks, and the head. Prompts are part of the time."],
        figures=figures,
    )


def _speed(folder: Path, options: Options) -> tuple[list[list[str]], list[list[str]]]:
    config = SMALL if options.is_quick else LARGE
    words = f"random Qwen3, {decode_parameters(config) / 1e6:.1f} M"
    cases = [
        (f"{words}: {count} x {tokens} tokens", float(count * tokens), Case.alike(count, tokens, config["vocab_size"]))
        for count, tokens in (((2, 4),) if options.is_quick else ((1, 64), (8, 64), (32, 64)))
    ]
    target = folder / "qwen3"
    with SideProcess("model maker", options.threads, ModelMaker) as maker:
        maker.call("make", target, config, "bfloat16")
    found, memory = [], []
    for case in cases:
        with _pair(options, Text, str(target), "bfloat16", pool_of([case[2]])) as (ours, plain):
            found += duels(ours, plain, [case], equal_share, options)
            memory.append([f"{case[0]}, bfloat16", *(f"{side.peak_memory_mb():.0f}" for side in (ours, plain))])
    return [duel.cells()[:4] for duel in found], memory


def _drawing(folder: Path, options: Options) -> tuple[list[list[str]], list[list[str]]]:
    from benchmarks.random_weights import z_image_folder

    transformer = TINY_Z_IMAGE if options.is_quick else MIDDLE_Z_IMAGE
    target = z_image_folder(folder / "z-image", transformer=transformer, vae=TINY_VAE, text_encoder=TINY_QWEN3)
    shapes = ((1, 64),) if options.is_quick else ((1, 256), (1, 512))
    cases = [(f"random Z-Image: {n} x {side} px", float(n), Pictures(n, side, 4)) for n, side in shapes]

    def distance(ours: Sequence[Any], theirs: Sequence[Any]) -> str:
        return f"{min(psnr(a, b) for a, b in zip(ours, theirs, strict=True)):.1f} dB"

    with _pair(options, Drawing, str(target)) as (ours, plain):
        found = duels(ours, plain, cases, distance, options)
    return [duel.cells()[:4] for duel in found], [[duel.case, duel.agreement] for duel in found]


def _judged(options: Options) -> tuple[list[list[str]], dict[str, Any]]:
    count = 2 if options.is_quick else 100
    shares: dict[str, dict[str, float]] = {one: {} for one in QUANTIZATIONS}
    with _pair(options, Judged) as sides:
        for config in STAGES:
            for quantization, side in zip(QUANTIZATIONS, sides, strict=True):
                shares[quantization] |= side.call("shares", config, count)[1]
    rows = [[name, *(f"{shares[one][name]:.1%}" for one in QUANTIZATIONS)] for name in shares["none"]]
    prompts = loose_prompts(count)
    with _pair(options, Writer) as (ours, plain):
        answers = plain.call("answers", prompts)[1]
        losses = [side.call("loss", prompts, answers)[1] for side in (ours, plain)]
        agreement = equal_share(ours.call("answers", prompts)[1], answers)
    rows.append(["language model: nats a token of what it answers", *(f"{loss:.4f}" for loss in losses)])
    rows.append(["language model: greedy tokens up to the first other", agreement, "100%"])
    return rows, {"count": count, "shares": shares, "losses": losses, "agreement": agreement}


@contextmanager
def _pair(options: Options, make: Any, *arguments: Any) -> Iterator[tuple[SideProcess, SideProcess]]:
    """Two processes: with int8, and without."""
    int8, none = QUANTIZATIONS
    with (
        SideProcess(int8, options.threads, make, *arguments, int8) as ours,
        SideProcess(none, options.threads, make, *arguments, none) as plain,
    ):
        yield ours, plain


def loose_prompts(count: int) -> list[list[int]]:
    """Token ids of held-out requests in loose words, in the model's own template."""
    from transformers import AutoTokenizer

    from tools.tiny.image.evaluate import CASES, prompts_for
    from vllm_omni.engine.ar.tokenizer import find_tokenizer
    from vllm_omni.utils.files import resolve_model_folder

    tokenizer = AutoTokenizer.from_pretrained(find_tokenizer(resolve_model_folder(TINY), None))
    case = next(case for case in CASES if case.is_loose)
    chats = [[{"role": "user", "content": words}] for words, _ in prompts_for(case, count, SEED)]
    return [
        tokenizer(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))["input_ids"]
        for chat in chats
    ]


def psnr(a: Any, b: Any) -> float:
    """Of two pictures of uint8, dB."""
    error = float(((a.astype(float) - b.astype(float)) ** 2).mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)
