"""Qwen3-Omni's thinker against transformers: greedy tokens and logits with every kind of media, alone and in a crowd,
in pieces, from the prefix cache, and when the KV pool is too small.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ar import KNOWN, assert_clean, done, drain, load, make_options, make_spec, make_task, make_tokenizer
from support.qwen3_omni import Case, make_case, save_tiny_qwen3_omni, tiny_reference

from vllm_omni.config.schema import StageConfig
from vllm_omni.engine.ar.engine import AREngine
from vllm_omni.engine.ar.text_spec import TextSpec
from vllm_omni.messages import StageDone, StageFailed
from vllm_omni.params import SamplingParams
from vllm_omni.worker.ar.media_encoders import MediaEncoders
from vllm_omni.worker.model_pool import ModelPool

NUM_TOKENS = 10
PARAMS = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=5)
CASES = {
    "text": make_case(""),
    "image": make_case("i", seed=1),
    "audio": make_case("a", seed=2),
    "video": make_case("v", seed=3),
    "video with its sound": make_case("t", seed=4),
    "all": make_case("aivi", seed=5),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_qwen3_omni(tmp_path_factory.mktemp("qwen3_omni") / "model")
    make_tokenizer().save_pretrained(folder / "words")
    return folder


@pytest.fixture(scope="module")
def pool() -> ModelPool:
    return ModelPool()


@pytest.fixture(scope="module")
def expected() -> dict[str, tuple[list[int], torch.Tensor]]:
    """The words and the log probabilities of each, as the reference writes them."""
    model = tiny_reference().thinker
    return {name: reference(model, case) for name, case in CASES.items()}


@torch.no_grad()
def reference(model: Any, case: Case) -> tuple[list[int], torch.Tensor]:
    ids = torch.tensor([case.token_ids])
    media = {**case.theirs, "attention_mask": torch.ones_like(ids)}
    options = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    made = model.generate(input_ids=ids, **media, **options, return_dict_in_generate=True, output_scores=True)
    return made.sequences[0, ids.shape[1] :].tolist(), torch.cat(made.scores).log_softmax(-1)


def make_engine(folder: Path, pool: ModelPool, **options: Any) -> AREngine:
    words = str(folder / "words")
    stage = StageConfig(
        name="text",
        kind="ar",
        model=str(folder),
        device="cpu",
        dtype="float32",
        options=make_options(part="thinker", tokenizer=words, **{"block_size": 4, "max_num_seqs": 8, **options}),
    )
    return load(make_spec(stage), models=pool)


def submit(engine: AREngine, name: str, case: Case) -> None:
    spec = KNOWN[engine][0]
    assert isinstance(spec, TextSpec)
    task = make_task("unread", PARAMS, name)
    engine.submit(dataclasses.replace(task, prepared=spec.input.accept(case.prompt(), PARAMS)))


def write(engine: AREngine, names: list[str]) -> dict[str, StageDone]:
    for name in names:
        submit(engine, name, CASES[name])
    ends = {event.request_id: event for event in drain(engine) if isinstance(event, StageDone | StageFailed)}
    assert set(ends) == set(names)
    return {name: done(event) for name, event in ends.items()}


def check(written: dict[str, StageDone], expected: dict[str, tuple[list[int], torch.Tensor]]) -> None:
    for name, event in written.items():
        tokens, logprobs = expected[name]
        meta = event.payload.meta
        assert meta["token_ids"] == tokens
        assert len(meta["completions"][0]["logprobs"]) == NUM_TOKENS
        for place, found in enumerate(meta["completions"][0]["logprobs"]):
            theirs = logprobs[place, [token for token, _ in found]]
            torch.testing.assert_close(torch.tensor([value for _, value in found]), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_tokens_and_logits_equal_transformers(name: str, folder: Path, pool: ModelPool, expected: Any) -> None:
    check(write(make_engine(folder, pool), [name]), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_batched_tokens": 5},
        {"max_num_seqs": 2, "block_size": 3, "prefix_caching": False},
        {"num_blocks": 40},
    ],
)
def test_a_crowd_in_pieces_and_in_a_small_pool_changes_nothing(
    options: dict[str, Any], folder: Path, pool: ModelPool, expected: Any
) -> None:
    engine = make_engine(folder, pool, **options)
    for names in (list(CASES), list(CASES)[::-1]):
        check(write(engine, names), expected)
        assert_clean(engine)
    if "num_blocks" in options:
        assert engine.get_stats()["num_preemptions"] > 0, "the pool is meant to be too small"


def test_a_prefix_hit_gives_the_same_and_encodes_nothing(
    folder: Path, pool: ModelPool, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    plain = MediaEncoders.encode

    def counting(self: MediaEncoders, item: Any) -> torch.Tensor:
        encoded.append(item.kind)
        return plain(self, item)

    monkeypatch.setattr(MediaEncoders, "encode", counting)
    engine = make_engine(folder, pool, max_num_batched_tokens=6)
    first = write(engine, ["all", "video"])
    assert sorted(encoded) == ["audio", "image", "image", "video", "video"], "each once, in however many pieces"
    encoded.clear()
    again = write(engine, ["all", "video"])
    assert not encoded
    for name in ("all", "video"):
        assert first[name].metrics["cache_hits"] == 0
        assert again[name].metrics["cache_hits"] > len(CASES[name].token_ids) - 5
    check(first, expected)
    check(again, expected)


def test_the_same_tokens_around_another_picture_are_no_prefix_hit(folder: Path, pool: ModelPool) -> None:
    other = make_case("i", seed=7)
    other.token_ids = list(CASES["image"].token_ids)
    engine = make_engine(folder, pool)
    one = write(engine, ["image"])["image"]
    submit(engine, "other", other)
    found = next(event for event in drain(engine) if isinstance(event, StageDone))
    assert found.metrics["cache_hits"] == 4, "the words before it alone"
    assert found.payload.meta["token_ids"] != one.payload.meta["token_ids"]
