"""A stream gives every sample of a request piece by piece, and the pieces are the whole."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.support.ar import make_model_folder
from vllm_omni import AsyncOmni, Omni, SamplingParams
from vllm_omni.request import Completion, OmniOutput

PROMPT = "a red circle left of a blue square"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = make_model_folder(tmp_path_factory.mktemp("samples") / "model")
    stage = {"kind": "ar", "model": str(folder), "chat_template": False, "block_size": 4, "num_blocks": 200}
    return {"stages": {"text": stage}, "outputs": ["text"], "device": "cpu", "dtype": "float32"}


def joined(parts: list[OmniOutput], sample: int) -> Completion:
    pieces = [part.results["text"].completions[sample] for part in parts if part.results]
    reasons = [piece.finish_reason for piece in pieces if piece.finish_reason is not None]
    assert len(reasons) == 1 and all(piece.token_ids or not piece.finish_reason for piece in pieces)
    logprobs = None if pieces[0].logprobs is None else tuple(row for piece in pieces for row in piece.logprobs or ())
    return Completion(
        "".join(piece.text for piece in pieces),
        tuple(token for piece in pieces for token in piece.token_ids),
        reasons[0],
        logprobs,
    )


CASES = {
    "three": SamplingParams(n=3, seed=1, max_tokens=12, temperature=1.5),
    "one": SamplingParams(seed=2, max_tokens=12),
    "with log probabilities": SamplingParams(n=3, seed=4, max_tokens=9, logprobs=2),
    "with those of the chosen alone": SamplingParams(n=2, seed=4, max_tokens=9, logprobs=0),
    "that end at different times": SamplingParams(n=5, seed=3, max_tokens=60, temperature=2.0, stop=["e", "a", "\n"]),
    "of special tokens that are shown": SamplingParams(n=2, seed=5, max_tokens=20, skip_special_tokens=False),
    "of which the first ends first": SamplingParams(n=2, seed=6, max_tokens=40, stop_token_ids=list(range(3, 120))),
}


@pytest.mark.parametrize("name", CASES)
def test_the_pieces_of_every_sample_are_its_whole(config: dict[str, Any], name: str) -> None:
    params = CASES[name]
    with Omni(config, progress=False) as omni:
        *parts, final = omni.stream(PROMPT, params)
        (whole,) = omni.generate(PROMPT, params)
    assert final.completions == whole.completions and len(final.completions) == (params.n or 1)
    assert all(len(part.results["text"].completions) == (params.n or 1) for part in parts if part.results)
    assert [joined(parts, sample) for sample in range(params.n or 1)] == final.completions


def test_an_asynchronous_stream_gives_the_same(config: dict[str, Any]) -> None:
    params = CASES["with log probabilities"]

    async def run() -> list[OmniOutput]:
        async with AsyncOmni(config) as omni:
            return [part async for part in omni.stream(PROMPT, params)]

    *parts, final = asyncio.run(run())
    assert [joined(parts, sample) for sample in range(3)] == final.completions


def test_the_metrics_count_the_prompt_and_what_of_it_was_cached(config: dict[str, Any]) -> None:
    ids = list(range(10, 31))
    params = SamplingParams(temperature=0, max_tokens=2, n=2)
    with Omni(config, progress=False) as omni:
        first, second = (omni.generate({"prompt_token_ids": ids}, params)[0].metrics["text"] for _ in range(2))
    assert first["prompt_tokens"] == second["prompt_tokens"] == 21
    assert (first["cached_tokens"], second["cached_tokens"]) == (0, 20), "whole blocks of four, once for both samples"
