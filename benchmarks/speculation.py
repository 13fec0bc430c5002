"""Tokens per second of an AR stage that drafts by prompt lookup against the same stage that does not.

The model is as large as text.py's middle one. Its weights are such that a token is followed by the next one of a circle
of 97, so that a prompt of two circles is a text to be copied; the higher the temperature, the more often it jumps
elsewhere. So what a draft saves is known exactly, and nothing is said of how often real texts repeat themselves.
"""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.limits import Limits
from benchmarks.measure import Options, Report, Table
from benchmarks.sides import Duel, SideProcess, duels
from benchmarks.text import MIDDLE, SMALL, ModelMaker

CIRCLE = 97
FEW = tuple(range(100, 116))
COLUMNS = ("case", "drafting, tokens/s", "without, tokens/s", "drafting / without", "accepted of drafted")


@dataclass(frozen=True, slots=True)
class Case:
    """few: whether a few tokens alone are written."""

    count: int
    new_tokens: int
    temperature: float
    vocab_size: int
    few: bool = False

    def prompts(self, repeat: int) -> list[list[int]]:
        rng = random.Random(repeat)
        starts = [rng.randrange(1, self.vocab_size // CIRCLE) * CIRCLE for _ in range(self.count)]
        return [[*range(start, start + CIRCLE)] * 2 for start in starts]


class CircleMaker(ModelMaker):
    """Writes the model."""

    def make(self, folder: Path, config: dict[str, Any], dtype: str) -> None:
        import torch
        from transformers import Qwen3ForCausalLM

        super().make(folder, {**config, "tie_word_embeddings": False}, dtype)
        model = Qwen3ForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.data.mul_(1e-3)
        ids = torch.arange(config["vocab_size"])
        before = ids - ids % CIRCLE + (ids % CIRCLE - 1) % CIRCLE
        model.lm_head.weight.data.copy_(model.model.embed_tokens.weight.data[before.clamp(max=len(ids) - 1)])
        model.save_pretrained(folder)


@dataclass(slots=True)
class Answers:
    """What a side wrote."""

    token_ids: list[list[int]]
    num_drafted: int = 0
    num_accepted: int = 0


class Stage:
    """One side."""

    def __init__(self, folder: str, dtype: str, drafts: bool) -> None:
        from vllm_omni import Omni

        keys = ["language_model.speculation={method: prompt_lookup}"] if drafts else []
        config = {
            "stages": {"language_model": {"kind": "ar", "model": folder}},
            "outputs": ["language_model"],
        }
        self._omni = Omni(config, overrides=keys, device="cpu", dtype=dtype, progress=False)

    def run(self, case: Case, repeat: int) -> Answers:
        from vllm_omni import SamplingParams

        params = SamplingParams(
            temperature=case.temperature,
            seed=repeat,
            max_tokens=case.new_tokens,
            ignore_eos=True,
            logit_bias=dict.fromkeys(FEW, 100.0) if case.few else None,
        )
        outputs = self._omni.generate([{"prompt_token_ids": ids} for ids in case.prompts(repeat)], params)
        answers = Answers([])
        for output in outputs:
            if output.error is not None:
                raise output.error
            counts = output.metrics["language_model"]
            answers.token_ids.append(list(output.token_ids or ()))
            answers.num_drafted += counts.get("drafted_tokens", 0)
            answers.num_accepted += counts.get("accepted_tokens", 0)
        return answers


def run(options: Options, limits: Limits | None = None) -> Report:
    found: list[Duel] = []
    config = SMALL if options.is_quick else MIDDLE
    dtype = "float32" if options.is_quick else "bfloat16"
    with tempfile.TemporaryDirectory() as folder:
        with SideProcess("model maker", options.threads, CircleMaker) as maker:
            maker.call("make", Path(folder), config, dtype)
        with (
            SideProcess("drafting", options.threads, Stage, folder, dtype, True) as us,
            SideProcess("without", options.threads, Stage, folder, dtype, False) as peer,
        ):
            found += duels(us, peer, cases(config["vocab_size"], options), agreement, options)
    return Report(
        "speculation",
        [Table("Tokens written per second, prompts included, bfloat16", COLUMNS, [duel.cells() for duel in found])],
        figures={"duels": [duel.figures() for duel in found]},
    )


def cases(vocab_size: int, options: Options) -> list[tuple[str, float, Case]]:
    """Name, tokens, case."""
    if options.is_quick:
        return [("2 copy", 24, Case(2, 12, 0.0, vocab_size))]
    found: list[tuple[str, float, Case]] = []
    for words, temperature, few in (
        ("copies", 0.0, False),
        ("copies with jumps", 1.8, False),
        ("never repeats itself", 5.0, False),
        ("16 tokens at random", 5.0, True),
    ):
        for count in (1, 8, 32):
            found.append((f"{count}: {words}", count * 96, Case(count, 96, temperature, vocab_size, few)))
    return found


def agreement(ours: Answers, plain: Answers) -> str:
    """The share of right drafts; both sides must have written the same."""
    if ours.token_ids != plain.token_ids:
        raise AssertionError("drafts have changed a text")
    return f"{ours.num_accepted / max(ours.num_drafted, 1):.0%} of {ours.num_drafted}"
