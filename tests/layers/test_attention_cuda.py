"""On a GPU: every attention backend that fits equals the definition, which is computed on the CPU in float32."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.attention import Step, find_backend

from vllm_omni import registry
from vllm_omni.layers.attention.base import AttentionUse

pytestmark = pytest.mark.cuda
SHAPES = {
    "decode": [(0, 1), (130, 1), (700, 1), (2100, 1)],
    "prefill": [(0, 300), (0, 17), (512, 65)],
    "mixed": [(300, 1), (0, 40), (17, 5), (1, 1), (600, 130)],
}


@pytest.mark.parametrize("name", registry.names("attention"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [16, 256])
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("window", [None, 100])
def test_backends_equal_the_definition(
    name: str, dtype: torch.dtype, size: int, kind: str, window: int | None, gpu: torch.device
) -> None:
    complaint = find_backend(name).complaint(AttentionUse(gpu, dtype, size, 64))
    if complaint is not None:
        pytest.skip(complaint)
    step = Step(SHAPES[kind], 16, 8, seed=1, garbage=float("nan"), size=size, head_dim=64, dtype=dtype, device=gpu)
    attended = step.attend(name, window).cpu().float()
    definition = step.on(torch.device("cpu"), torch.float32).attend("reference", window)
    tolerance = 2e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps * float(definition.abs().max())
    torch.testing.assert_close(attended, definition, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["flash", "triton"])
@pytest.mark.parametrize("window", [None, 100])
def test_a_row_is_the_same_to_the_last_bit_alone_and_in_a_crowd(
    name: str, window: int | None, gpu: torch.device
) -> None:
    complaint = find_backend(name).complaint(AttentionUse(gpu, torch.float16, 256, 64))
    if complaint is not None:
        pytest.skip(complaint)
    step = Step(SHAPES["mixed"], 16, 8, seed=2, size=256, head_dim=64, dtype=torch.float16, device=gpu)
    crowd = step.attend(name, window)
    for index in range(len(step.shapes)):
        alone, rows = step.alone(index)
        torch.testing.assert_close(alone.attend(name, window), crowd[rows], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["flash", "triton"])
def test_what_a_step_reads_is_in_its_tensors(name: str, gpu: torch.device) -> None:
    """As when a graph is replayed with other lengths in them."""
    complaint = find_backend(name).complaint(AttentionUse(gpu, torch.float16, 256, 64))
    if complaint is not None:
        pytest.skip(complaint)
    step = Step(SHAPES["decode"], 16, 8, seed=3, size=256, head_dim=64, dtype=torch.float16, device=gpu)
    metadata = dataclasses.replace(step.metadata, context_lens=(1,) * len(step.shapes))
    attended = find_backend(name)(metadata)(step.query, step.key, step.value, step.cache.clone(), None)
    torch.testing.assert_close(attended, step.attend(name), rtol=0, atol=0)
