"""Batches of one step: decode buffers filled in place equal tensors made anew, padded or not, step after step."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.language_models import CPU, TINY, load_model, save_random_model, write
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_omni.core.ar.block_manager import BlockManager
from vllm_omni.core.ar.scheduler import Chunk
from vllm_omni.core.ar.sequence import Sequence
from vllm_omni.layers.token_inputs import InputRows, TokenInputs
from vllm_omni.worker.ar.batch import DecodeBatch, StepBatch
from vllm_omni.worker.ar.kv_pool import KVLayout, KVPool
from vllm_omni.worker.ar.language_model import LanguageModel

MOST_SEQUENCES, MOST_BLOCKS = 5, 6
BUCKETS = (1, 2, 4, 8)
PROMPTS = [[5, 6, 7], [9] * 11, [1, 2, 3, 4, 5, 6, 7, 8], [300, 20], list(range(40, 57))]
NOTHING: dict[int, TokenInputs] = {}


def make_pool(has_scratch: bool = False) -> KVPool:
    layout = KVLayout(1, 1, 2, (1,), 4)
    return KVPool(layout, num_blocks=40, block_size=4, device=CPU, dtype=torch.float32, has_scratch=has_scratch)


def make_decode_batch(buckets: tuple[int, ...] = ()) -> DecodeBatch:
    pool = make_pool(bool(buckets))
    return DecodeBatch(pool, max_num_seqs=MOST_SEQUENCES, max_num_blocks=MOST_BLOCKS, bucket_sizes=buckets)


def make_sequence(number: int, table: list[int], num_tokens: int) -> Sequence:
    sequence = Sequence(number, f"r{number}", [(31 * number + 7 * i) % 320 for i in range(num_tokens)], max_tokens=24)
    sequence.block_table = table
    return sequence


def last_token(sequence: Sequence, samples: bool = True) -> Chunk:
    return Chunk(sequence, sequence.num_tokens - 1, sequence.num_tokens, samples)


def with_draft(chunk: Chunk, size: int) -> Chunk:
    return replace(chunk, end=chunk.end + size, draft=tuple(range(100, 100 + size))) if chunk.samples else chunk


def assert_same_batch(got: StepBatch, expected: StepBatch) -> None:
    """In the real rows; and padding rows have inputs that harm nobody."""
    count = len(expected.token_ids)
    assert torch.equal(got.token_ids[:count], expected.token_ids)
    assert torch.equal(got.positions[..., :count], expected.positions)
    assert torch.equal(got.sampling_rows, expected.sampling_rows)
    ours, theirs = got.attention, expected.attention
    assert torch.equal(ours.slot_mapping[:count], theirs.slot_mapping)
    assert ours.query_starts[: count + 1] == theirs.query_starts
    assert ours.context_lens[:count] == theirs.context_lens
    for metadata in (ours, theirs):
        assert metadata.query_starts_tensor.tolist() == list(metadata.query_starts)
        assert metadata.context_lens_tensor.tolist() == list(metadata.context_lens)
    for row, length in enumerate(theirs.context_lens):
        num_blocks = -(-length // theirs.block_size)
        assert torch.equal(ours.block_table[row, :num_blocks], theirs.block_table[row, :num_blocks])


sequences_of_a_step = st.lists(
    st.tuples(st.integers(1, 4 * MOST_BLOCKS - 3), st.booleans(), st.sampled_from([0, 0, 1, 3])),
    min_size=1,
    max_size=MOST_SEQUENCES,
)


@settings(max_examples=60)
@given(
    steps=st.lists(sequences_of_a_step, min_size=1, max_size=4),
    seed=st.integers(0, 99),
    buckets=st.sampled_from([(), BUCKETS]),
)
def test_a_decode_batch_equals_a_batch_made_anew(
    steps: list[list[tuple[int, bool, int]]], seed: int, buckets: tuple[int, ...]
) -> None:
    """Steps of other sequences with random block tables follow one another in the same buffers."""
    batch, pool = make_decode_batch(buckets), make_pool()
    generator = torch.Generator().manual_seed(seed)
    for shapes in steps:
        free = torch.randperm(40, generator=generator).tolist()
        chunks = [
            with_draft(
                last_token(make_sequence(number, [free.pop() for _ in range(-(-(length + 3) // 4))], length), samples),
                size,
            )
            for number, (length, samples, size) in enumerate(shapes)
        ]
        while not batch.fits(chunks):
            chunks.pop()
        assert_same_batch(batch.fill(chunks, NOTHING), StepBatch.of(chunks, NOTHING, pool))


@settings(max_examples=40)
@given(data=st.data(), buckets=st.sampled_from([(), BUCKETS]))
def test_block_tables_stay_right_while_sequences_grow_change_rows_and_are_preempted(
    data: st.DataObject, buckets: tuple[int, ...]
) -> None:
    batch, pool, blocks = make_decode_batch(buckets), make_pool(), BlockManager(40, 4, prefix_caching=False)
    sequences = [make_sequence(number, [], data.draw(st.integers(1, 9))) for number in range(MOST_SEQUENCES)]
    for sequence in sequences:
        blocks.allocate(sequence)
    for _ in range(8):
        running = data.draw(st.lists(st.sampled_from(sequences), min_size=1, unique_by=lambda s: s.sequence_id))
        for sequence in running:
            if data.draw(st.integers(0, 5)) == 0:
                blocks.preempt(sequence)
                blocks.allocate(sequence)
            if sequence.num_tokens < 4 * MOST_BLOCKS:
                sequence.append(data.draw(st.integers(0, 319)))
            blocks.grow(sequence, sequence.num_tokens)
        chunks = [last_token(sequence) for sequence in running]
        assert_same_batch(batch.fill(chunks, NOTHING), StepBatch.of(chunks, NOTHING, pool))


def places(batch: StepBatch) -> list[int]:
    tensors: list[Tensor] = [
        batch.token_ids,
        batch.positions,
        batch.attention.slot_mapping,
        batch.attention.block_table,
        batch.attention.query_starts_tensor,
        batch.attention.context_lens_tensor,
    ]
    return [tensor.data_ptr() for tensor in tensors]


def test_every_step_of_a_bucket_gets_the_same_places_in_memory() -> None:
    batch = make_decode_batch(BUCKETS)
    sequences = [make_sequence(number, [number * 2, number * 2 + 1], 7) for number in range(4)]
    first = batch.fill([last_token(sequence) for sequence in sequences], NOTHING)
    sequences[1].append(3)
    second = batch.fill([last_token(sequence) for sequence in sequences[:3]], NOTHING)
    assert places(first) == places(second)
    assert [len(step.token_ids) for step in (first, second)] == [4, 4]
    assert second.attention.block_table.shape == (4, MOST_BLOCKS)


def test_padding_rows_write_to_the_scratch_block_and_read_nothing_else() -> None:
    batch = make_decode_batch(BUCKETS)
    full = [last_token(make_sequence(number, [number], 3)) for number in range(4)]
    batch.fill(full, NOTHING)
    padded = batch.fill(full[:3], NOTHING).attention
    assert padded.slot_mapping.tolist() == [2, 6, 10, 160]
    assert padded.block_table[3, 0] == 40, "the block behind the pool's forty"
    assert padded.context_lens[3] == 1
    assert_same_batch(batch.fill(full, NOTHING), StepBatch.of(full, NOTHING, make_pool()))  # its owner comes back


def test_buffers_on_an_accelerator_follow_those_on_the_host() -> None:
    batch = make_decode_batch(BUCKETS)
    internals: Any = batch
    internals._on_device = tuple(buffer.clone() for buffer in internals._host)
    for count in (4, 3, 1, 4):
        chunks = [
            last_token(make_sequence(number, [number + count, 30 + number], 4 + count)) for number in range(count)
        ]
        got = batch.fill(chunks, NOTHING)
        assert got.token_ids.data_ptr() == internals._on_device[0].data_ptr()
        assert_same_batch(got, StepBatch.of(chunks, NOTHING, make_pool()))


def test_host_buffers_are_written_only_when_the_last_copies_of_them_have_been_made() -> None:
    batch = make_decode_batch(BUCKETS)
    internals: Any = batch
    internals._on_device = tuple(buffer.clone() for buffer in internals._host)
    seen: list[tuple[str, list[int]]] = []

    class Fence:
        def wait(self) -> None:
            seen.append(("wait", internals._columns[0].tolist()))

        def record(self) -> None:
            seen.append(("record", internals._on_device[0][0].tolist()))

    internals._fence = Fence()
    for token in (7, 9):
        sequence = make_sequence(0, [1], 2)
        sequence.token_ids[-1] = token
        batch.fill([last_token(sequence)], NOTHING)
    assert [(what, tokens[0]) for what, tokens in seen] == [("wait", 0), ("record", 7), ("wait", 7), ("record", 9)]


def test_a_chunk_of_two_tokens_is_no_decode_step() -> None:
    sequence = make_sequence(0, [1], 4)
    batch = make_decode_batch()
    assert not batch.fits([last_token(sequence), Chunk(make_sequence(1, [2], 4), 0, 2, False)])


def test_drafts_are_a_decode_step_as_long_as_there_are_rows() -> None:
    drafts = [with_draft(last_token(make_sequence(number, [number, 9], 3)), size) for number, size in ((0, 2), (1, 1))]
    batch = make_decode_batch()
    assert batch.fits(drafts) and not batch.fits([*drafts, last_token(make_sequence(2, [3], 1))])
    assert batch.fill(drafts, NOTHING).sampling_rows.tolist() == [0, 1, 2, 3, 4]


def test_tokens_of_a_draft_are_sequences_of_their_own_for_attention() -> None:
    prompt, writer = make_sequence(0, [3, 4], 5), with_draft(last_token(make_sequence(1, [5, 6], 4)), 3)
    batch = StepBatch.of([with_draft(Chunk(prompt, 0, 5, True), 1), writer], NOTHING, make_pool())
    assert batch.attention.query_starts == (0, 5, 6, 7, 8, 9, 10)
    assert batch.attention.context_lens == (5, 6, 4, 5, 6, 7)
    assert batch.attention.block_table[:, 0].tolist() == [3, 3, 5, 5, 5, 5]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 5, 6]
    assert batch.sampling_rows.tolist() == [4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("buckets", [(), BUCKETS])
def test_positions_and_rows_of_their_own_come_along(buckets: tuple[int, ...]) -> None:
    sequences = [make_sequence(number, [number, number + 10], 6) for number in range(3)]
    chunks = [last_token(sequence) for sequence in sequences]
    rows = InputRows(torch.tensor([0]), torch.ones(1, 8), torch.tensor([True]))
    inputs = {1: TokenInputs(torch.tensor([[7], [8], [9]]), rows)}
    got, expected = make_decode_batch(buckets).fill(chunks, inputs), StepBatch.of(chunks, inputs, make_pool())
    assert_same_batch(got, expected)
    assert expected.positions.tolist() == [[5, 7, 5], [5, 8, 5], [5, 9, 5]]
    assert got.positions.shape[1] == len(got.token_ids)
    for batch in (got, expected):
        assert batch.input_rows is not None and batch.input_rows.indices.tolist() == [1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    folder = tmp_path_factory.mktemp("llama")
    return load_model(save_random_model(LlamaForCausalLM, LlamaConfig(**TINY), folder))


@pytest.mark.parametrize("attention", ["reference", "sdpa"])
@pytest.mark.parametrize("buckets", [(), (1, 2, 4, 8), (16,)])
def test_logits_and_states_are_those_of_batches_made_anew(
    buckets: tuple[int, ...], attention: str, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    got = write(model, PROMPTS, 12, tapped_layers=[0, 2, 3], attention=attention, decode_buckets=buckets)
    monkeypatch.setattr(DecodeBatch, "fits", staticmethod(lambda chunks: False))
    expected = write(model, PROMPTS, 12, tapped_layers=[0, 2, 3], attention=attention)
    tolerance = 0 if not buckets else 1e-5  # a padded product may round otherwise
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.token_ids == theirs.token_ids
        torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), rtol=0, atol=tolerance)
        torch.testing.assert_close(ours.states, theirs.states, rtol=0, atol=tolerance)


def test_alone_equals_in_a_batch(model: LanguageModel) -> None:
    for prompt, crowded in zip(PROMPTS, write(model, PROMPTS, 12), strict=True):
        (alone,) = write(model, [prompt], 12)
        assert alone.token_ids == crowded.token_ids
        torch.testing.assert_close(torch.stack(alone.logits), torch.stack(crowded.logits), rtol=0, atol=1e-5)


def test_the_offsets_of_a_mixed_step_count_its_tokens() -> None:
    prompt, decode = make_sequence(0, [3, 1], 6), make_sequence(1, [2], 3)
    batch = StepBatch.of([Chunk(prompt, 1, 6, False), last_token(decode)], NOTHING, make_pool())
    assert [stop - start for start, stop in pairwise(batch.attention.query_starts)] == [5, 1]
    assert batch.attention.slot_mapping.tolist() == [13, 14, 15, 4, 5, 10]
    assert batch.sampling_rows.tolist() == [5]
    assert batch.attention.block_table.tolist() == [[3, 1], [2, 0]]
