"""Captured decode steps: what is replayed equals the plain path, with taps; what cannot be captured runs as before."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.attention import CPU, SIZE, USE, find_backend
from support.graphs import CalledGraphs
from support.language_models import TINY, load_model, save_random_model, write
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from vllm_omni.core.ar.scheduler import Chunk
from vllm_omni.core.ar.sequence import Sequence
from vllm_omni.errors import StageError
from vllm_omni.layers.attention.flash import FlashAttention, FlashPart
from vllm_omni.layers.attention.triton import TritonAttention
from vllm_omni.layers.native.experts import NativeExperts
from vllm_omni.layers.sampler import SampledToken, Sampler, SamplingRow
from vllm_omni.layers.token_inputs import TokenInputs
from vllm_omni.params import SamplingParams
from vllm_omni.worker.ar import step_logits
from vllm_omni.worker.ar.bucket_graphs import bucket_sizes
from vllm_omni.worker.ar.decode_graphs import capture_complaint
from vllm_omni.worker.ar.language_model import LanguageModel, LanguageModelFolder
from vllm_omni.worker.ar.model_runner import ModelRunner
from vllm_omni.worker.ar.step_logits import StepLogits

PROMPTS = [[5, 6, 7], [9] * 11, [1, 2, 3, 4, 5, 6, 7, 8], [300, 20], list(range(40, 57))]
WINDOWED = {"sliding_window": 6}
NO_TRITON = TritonAttention.complaint(USE)
CAPTURABLE = [
    "capturable",
    pytest.param("triton", marks=pytest.mark.skipif(NO_TRITON is not None, reason=f"triton: {NO_TRITON}")),
    "flash by torch",
    "flash by package",
]


@pytest.fixture(scope="module", params=["llama", "mistral"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """Without and with a window."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "llama":
        return load_model(save_random_model(LlamaForCausalLM, LlamaConfig(**TINY), folder))
    return load_model(save_random_model(MistralForCausalLM, MistralConfig(**TINY, **WINDOWED), folder))


@pytest.mark.parametrize("attention", CAPTURABLE)
def test_captured_steps_equal_the_plain_path(attention: str, model: LanguageModel) -> None:
    graphs = CalledGraphs(is_strict="flash" not in attention)  # whose stand-ins read lengths
    taps, num_tokens = [0, 2, 3], 4 if attention == "triton" else 12  # the interpreter is slow
    got = write(
        model, PROMPTS, num_tokens, tapped_layers=taps, attention=attention, decode_buckets=(1, 2, 8), graphs=graphs
    )
    assert graphs.num_captured == 3 and graphs.num_replayed >= num_tokens - 1
    expected = write(model, PROMPTS, num_tokens, tapped_layers=taps, attention="reference")
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.token_ids == theirs.token_ids
        torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.states, theirs.states, rtol=0, atol=1e-5)


def make_runner(model: LanguageModel, graphs: CalledGraphs | None = None, **changes: Any) -> ModelRunner:
    keys: dict[str, Any] = {"device": CPU, "attention": find_backend("capturable"), "tapped_layers": ()}
    if graphs is not None:
        keys |= {"graphs": graphs, "decode_buckets": (1, 2, 4)}
    pool: dict[str, Any] = {"num_blocks": 16, "block_size": SIZE, "max_num_seqs": 4, "dtype": torch.float32}
    return ModelRunner(model, can_sample=True, **pool, **{**keys, **changes})


class Nowhere:
    """A kernel of FlashAttention that only looks at where its arguments are."""

    takes_mixed = False

    def __call__(self, query: Any, keys: Any, values: Any, part: FlashPart, window: int | None) -> torch.Tensor:
        numbers = (part.query_starts, part.key_starts, part.lengths, part.block_table)
        assert {tensor.device.type for tensor in (query, keys, values, *numbers)} == {"meta"}
        return torch.empty_like(query)


class FlashNowhere(FlashAttention):
    find_kernel = staticmethod(Nowhere)


@pytest.mark.parametrize("attention", [find_backend("capturable"), find_backend("sdpa"), FlashNowhere])
def test_a_step_stands_wholly_on_its_device_and_asks_it_for_no_number(
    attention: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device without memory refuses tensors of the CPU, and has no numbers to give: as a GPU, which would wait."""
    nowhere = torch.device("meta")
    monkeypatch.setattr(step_logits, "Readout", list)  # which alone brings numbers to the host
    folder = LanguageModelFolder.open(save_random_model(LlamaForCausalLM, LlamaConfig(**TINY), tmp_path))
    with nowhere:
        model = folder.model_class(folder.config)
    graphs: Any = {"graphs": CalledGraphs(), "decode_buckets": (1, 2, 4)} if attention.is_capturable else {}
    runner = make_runner(model, device=nowhere, attention=attention, tapped_layers=[0, 2], **graphs)
    first, second = make_sequence(0, [1, 2, 3, 4, 5]), make_sequence(1, [7])
    for chunks in (
        [Chunk(first, 0, 3, False)],
        [Chunk(first, 3, 5, True), Chunk(second, 0, 1, True)],
        [Chunk(first, 4, 5, True), Chunk(second, 0, 1, True)],
        [Chunk(first, 4, 5, False), Chunk(second, 0, 1, True)],
    ):
        step = runner.run(chunks)
        assert (
            step.logits is not None
            and step.logits.device == nowhere
            and len(step.logits) == sum(chunk.samples for chunk in chunks)
        )
    if attention.is_capturable:
        chunks = [Chunk(first, 4, 5, True), Chunk(second, 0, 1, True)]
        rows, sampler = [sampling_row(temperature=0.9, top_p=0.5), sampling_row(temperature=1.0, top_k=5)], Sampler()
        runner.run(chunks).choose(sampler, rows)
        runner.run_ahead(chunks, [True, False], lambda step: step.choose(sampler, rows, tokens_ahead=1).chosen)
        assert runner.run([Chunk(first, 5, 6, True)]).logits is None  # it was begun


def make_sequence(number: int, tokens: list[int]) -> Sequence:
    sequence = Sequence(number, f"r{number}", tokens, max_tokens=8)
    sequence.block_table = [2 * number, 2 * number + 1]
    return sequence


def test_the_largest_bucket_is_captured_first(model: LanguageModel) -> None:
    sizes: list[int] = []

    class Sizes(CalledGraphs):
        def capture(self, work: Any) -> Any:
            sizes.append(len(work.args[1].token_ids))
            return super().capture(work)

    make_runner(model, Sizes())
    assert sizes == [4, 2, 1]


def test_a_runner_with_graphs_is_freed_at_once(model: LanguageModel) -> None:
    """Not when garbage is next collected: its KV pool may be most of a GPU."""

    class Forgetful(CalledGraphs):
        """As CUDA graphs: what was captured is not needed any more."""

        def capture(self, work: Any) -> Any:
            work()
            return lambda: None

    runner = make_runner(model, Forgetful())
    watched = weakref.ref(runner)
    gc.disable()
    try:
        del runner
        assert watched() is None
    finally:
        gc.enable()


def test_capturing_touches_no_block_but_the_scratch_block(model: LanguageModel) -> None:
    """Engines are rebuilt beside others, and a pool may be shared by then."""
    runner: Any = make_runner(model, CalledGraphs())
    pool = runner._pool
    pool.kv_cache.fill_(7.0)
    runner._capture(CalledGraphs(), (1, 2, 4))
    assert (pool.kv_cache[:, :, : pool.num_blocks] == 7.0).all()
    assert (pool.kv_cache[:, :, pool.scratch_block, 0] != 7.0).all()


def test_only_steps_of_single_tokens_that_are_ids_alone_are_replayed(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = CalledGraphs()
    runner = make_runner(model, graphs)
    prompt, other = make_sequence(0, [3, 4, 5]), make_sequence(1, [6])
    runner.run([Chunk(prompt, 0, 3, True)])
    assert graphs.num_replayed == 0
    expected = runner.run([Chunk(other, 0, 1, True)]).logits.clone()
    assert graphs.num_replayed == 1
    rotary: Any = model.decoder.rotary  # type: ignore[attr-defined]
    monkeypatch.setattr(rotary, "axes", torch.zeros(len(rotary.frequencies), dtype=torch.int64))
    at_zero = {1: TokenInputs(torch.zeros(3, 1, dtype=torch.int64))}
    torch.testing.assert_close(runner.run([Chunk(other, 0, 1, True)], at_zero).logits, expected)
    assert graphs.num_replayed == 1


def test_rows_that_do_not_sample_give_no_logits(model: LanguageModel) -> None:
    graphs = CalledGraphs()
    runner = make_runner(model, graphs)
    sequences = [make_sequence(number, [number + 3]) for number in range(3)]
    everyone = runner.run([Chunk(sequence, 0, 1, True) for sequence in sequences]).logits.clone()
    some = runner.run([Chunk(sequence, 0, 1, sequence is not sequences[1]) for sequence in sequences])
    torch.testing.assert_close(some.logits, everyone[[0, 2]], rtol=0, atol=0)
    assert some.largest is not None and some.largest.tolist() == everyone[[0, 2]].argmax(-1).tolist()
    nobody = runner.run([Chunk(sequence, 0, 1, False) for sequence in sequences])
    assert nobody.logits.shape == (0, 320) and nobody.choose(Sampler(), []).sample() == []
    assert graphs.num_replayed == 3


def sampling_row(**params: Any) -> SamplingRow:
    return SamplingRow(SamplingParams(**{"temperature": 0, **params}), [], [])


def test_greedy_tokens_come_from_the_step_and_all_others_from_the_logits() -> None:
    logits = torch.randn(4, 50)
    rows = [sampling_row(), sampling_row(temperature=1.0, seed=5), sampling_row(logit_bias={7: 100.0}), sampling_row()]
    chosen = StepLogits(logits, torch.tensor([11, 12, 13, 14])).choose(Sampler(), rows).sample()
    rows[1] = sampling_row(temperature=1.0, seed=5)
    plain = StepLogits(logits).choose(Sampler(), rows).sample()
    assert chosen == [[SampledToken(11)], plain[1], [SampledToken(7)], [SampledToken(14)]]


def test_what_a_step_has_chosen_counts_for_drafts_too() -> None:
    logits = torch.randn(7, 50)
    drafts = [(12, 30), (), (9, 9)]
    draws = StepLogits(logits[[4]]).choose(Sampler(), [sampling_row(temperature=1.0, seed=5)]).sample()[0]
    rows = [sampling_row(), sampling_row(logit_bias={7: 100.0}), sampling_row(temperature=1.0, seed=5)]
    greedy = torch.tensor([12, 31, 1, 2, 3, 4, 5])
    chosen = StepLogits(logits, greedy).choose(Sampler(), rows, drafts).sample()
    assert chosen == [[SampledToken(12), SampledToken(31)], [SampledToken(7)], draws]


def test_a_row_that_is_not_finite_fails_alone() -> None:
    logits = torch.randn(3, 50)
    logits[1, 4] = float("nan")
    greedy = torch.tensor([3, -1, 5])
    (first,), (second,), (third,) = (
        StepLogits(logits, greedy).choose(Sampler(), [sampling_row() for _ in range(3)]).sample()
    )
    assert (first, third) == (SampledToken(3), SampledToken(5))
    assert isinstance(second, StageError) and "NaN or infinity" in str(second)


def test_what_is_not_finite_is_marked_within_the_step(model: LanguageModel) -> None:
    runner = make_runner(model, CalledGraphs())
    weights: torch.Tensor = model.embed_tokens.weight  # type: ignore[attr-defined]
    before = weights[9].clone()
    try:
        weights[9] = float("inf")
        step = runner.run([Chunk(make_sequence(0, [9]), 0, 1, True), Chunk(make_sequence(1, [8]), 0, 1, True)])
        assert step.largest is not None
        assert [token < 0 for token in step.largest.tolist()] == [True, False]
    finally:
        weights[9] = before


@given(most=st.integers(1, 5000))
def test_buckets_hold_every_number_of_sequences_with_little_padding(most: int) -> None:
    sizes = bucket_sizes(most)
    assert list(sizes) == sorted(set(sizes)) and sizes[0] == 1
    assert sizes[-1] >= most and (len(sizes) == 1 or sizes[-2] < most)
    assert len(sizes) <= 64
    assert all(after <= 2 * before for before, after in zip(sizes, sizes[1:], strict=False))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device": CPU}, "got device cpu, expected cuda"),
        ({"can_write": False}, "writes nothing"),
        ({"is_capturable": False}, "Tiny plans each step by its tokens"),
        ({"scaled_beyond": 32}, "depend on the length"),
        ({"attention": "sdpa"}, "expected attention: triton or flash"),
        ({}, None),
    ],
)
def test_what_cannot_be_captured_is_said_in_words(changes: dict[str, Any], words: str | None) -> None:
    given = {"device": torch.device("cuda"), "can_write": True, "attention": "capturable", "is_capturable": True}
    given |= {"scaled_beyond": None, **changes}
    folder: Any = SimpleNamespace(
        name="Tiny",
        model_class=SimpleNamespace(is_capturable=given["is_capturable"]),
        config=SimpleNamespace(scaled_beyond=given["scaled_beyond"]),
    )
    attention = find_backend(given["attention"])
    complaint = capture_complaint(folder, attention, can_write=given["can_write"], device=given["device"])
    assert complaint is None if words is None else words in (complaint or "")


def test_the_device_is_asked_for_numbers_by_sparse_experts_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `is_capturable` of a model says is so, where its experts are computed one by one, as on a GPU."""
    monkeypatch.setattr(NativeExperts, "find", lambda pairs: None)
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8}
    sparse = load_model(save_random_model(Qwen3MoeForCausalLM, Qwen3MoeConfig(**{**TINY, **experts}), tmp_path))
    assert not sparse.is_capturable
    with pytest.raises(AssertionError, match="asks the device"):
        make_runner(sparse, CalledGraphs())
