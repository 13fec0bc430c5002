"""Triton's kernels in the interpreter, beyond what every backend is tested for: long contexts split over their keys,
any block size, head size and dtype; and what makes a decode step fit for a graph.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.attention import USE, Step, find_backend

from vllm_omni.layers.attention.triton import MAX_SPLITS, MIN_SPLIT, TritonAttention

TESTS = Path(__file__).resolve().parents[1]
COMPLAINT = TritonAttention.complaint(USE)
pytestmark = pytest.mark.skipif(COMPLAINT is not None, reason=f"attention 'triton': {COMPLAINT}")


@pytest.mark.parametrize("window", [None, 1, 200, 777])
def test_contexts_that_are_split_equal_the_definition(window: int | None) -> None:
    pasts = [0, MIN_SPLIT - 1, MIN_SPLIT, 5 * MIN_SPLIT + 3, MIN_SPLIT * MAX_SPLITS + 70]
    step = Step([(past, 1) for past in pasts], 4, 2, seed=2, garbage=float("nan"), size=16)
    torch.testing.assert_close(step.attend("triton", window), step.attend("reference", window), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 3, 16, 256])
@pytest.mark.parametrize("head_dim", [8, 20, 80, 128])
def test_any_block_size_and_head_size(size: int, head_dim: int) -> None:
    step = Step([(130, 1), (0, 1), (61, 9), (0, 33)], 6, 2, seed=3, garbage=float("nan"), size=size, head_dim=head_dim)
    torch.testing.assert_close(step.attend("triton", 70), step.attend("reference", 70), rtol=1e-5, atol=1e-5)


def test_half_precision_is_as_close_as_its_rounding() -> None:
    step = Step([(300, 1), (0, 40), (17, 5)], 4, 1, seed=4, dtype=torch.float16, head_dim=32)
    expected = step.attend("reference")
    tolerance = 4 * torch.finfo(torch.float16).eps * float(expected.abs().max())
    torch.testing.assert_close(step.attend("triton"), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("window", [None, 150])
def test_a_row_is_the_same_to_the_last_bit_alone_and_in_a_crowd(window: int | None) -> None:
    step = Step([(300, 1), (2100, 1), (2, 1), (0, 70), (140, 4)], 4, 2, seed=8, size=16)
    crowd = step.attend("triton", window)
    for index in range(len(step.shapes)):
        alone, rows = step.alone(index)
        torch.testing.assert_close(alone.attend("triton", window), crowd[rows], rtol=0, atol=0)


def test_a_row_is_the_same_in_whatever_chunks_a_prompt_is_computed() -> None:
    """To the last rounding: numpy, by which the interpreter multiplies, adds up a row by where it stands."""
    whole = Step([(0, 150)], 4, 2, seed=9, size=16)
    expected = whole.attend("triton", 60)
    part = Step([(0, 150)], 4, 2, seed=9, size=16)
    metadata = whole.metadata
    part.cache.flatten(1, 2)[:, metadata.slot_mapping] = torch.stack([part.key, part.value])
    part.shapes = [(70, 80)]
    part.query, part.key, part.value = part.query[70:], part.key[70:], part.value[70:]
    torch.testing.assert_close(part.attend("triton", 60), expected[70:], rtol=1e-6, atol=1e-6)


def test_a_step_of_single_tokens_reads_its_lengths_from_the_tensors() -> None:
    """What a graph has captured is replayed with other numbers in them."""
    step = Step([(300, 1), (10, 1), (77, 1)], 4, 2, seed=5)
    metadata = dataclasses.replace(step.metadata, context_lens=(1, 1, 1))
    attended = find_backend("triton")(metadata)(step.query, step.key, step.value, step.cache.clone(), None)
    torch.testing.assert_close(attended, step.attend("reference"), rtol=1e-5, atol=1e-5)


def test_the_width_of_the_block_table_changes_nothing() -> None:
    step = Step([(300, 1), (10, 1)], 4, 2, seed=5)
    expected = step.attend("triton")
    step.tables = [table + [0] * (600 - len(table)) for table in step.tables]
    torch.testing.assert_close(step.attend("triton"), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("capability", "shared_kb", "kernels"), [(86, 99, 36), (90, 227, 39)])
def test_the_kernels_compile_for_gpus_and_fit_their_shared_memory(
    capability: int, shared_kb: int, kernels: int
) -> None:
    """Machine code is made without a GPU; shared_kb: what a block of threads may have there."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    command = [sys.executable, "-m", "support.triton_compiler", str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == kernels and max(found.values()) <= shared_kb * 1024, found
