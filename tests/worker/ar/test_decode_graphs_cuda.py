"""On a GPU: decode steps in CUDA graphs equal steps without them, and those of the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.attention import find_backend
from support.graphs import CalledGraphs
from support.language_models import CPU, TINY, save_random_model, write
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from vllm_omni.layers.attention.base import AttentionUse
from vllm_omni.utils.device import CudaGraphs, StepGraphs, is_cuda
from vllm_omni.worker.ar.language_model import LanguageModelFolder

pytestmark = pytest.mark.cuda
PROMPTS = [[5, 6, 7], [9] * 11, [1, 2, 3, 4, 5, 6, 7, 8], [300, 20], list(range(40, 57))]
FAMILIES: dict[str, Any] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**TINY)),
    "windows": (MistralForCausalLM, MistralConfig(**TINY, sliding_window=6)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_steps_equal_plain_ones_and_the_cpu(family: str, tmp_path: Path, gpu: torch.device) -> None:
    complaint = find_backend("triton").complaint(AttentionUse(gpu, torch.float32, 4, 8))
    if complaint is not None:
        pytest.skip(complaint)
    folder = LanguageModelFolder.open(save_random_model(*FAMILIES[family], tmp_path))
    graphs: StepGraphs = CudaGraphs(gpu) if is_cuda(gpu) else CalledGraphs()
    keys: dict[str, Any] = {"tapped_layers": [0, 2, 3], "device": gpu, "attention": "triton"}
    model, num_tokens = folder.load(gpu, torch.float32), 12 if is_cuda(gpu) else 3
    captured = write(model, PROMPTS, num_tokens, **keys, decode_buckets=(1, 2, 4, 8), graphs=graphs)
    plain = write(model, PROMPTS, num_tokens, **keys)
    reference = write(folder.load(CPU, torch.float32), PROMPTS, num_tokens, tapped_layers=[0, 2, 3])
    for ours, eager, theirs in zip(captured, plain, reference, strict=True):
        assert ours.token_ids == eager.token_ids == theirs.token_ids
        logits = [torch.stack(found.logits).cpu() for found in (ours, eager, theirs)]
        torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-4)
        torch.testing.assert_close(logits[0], logits[2], rtol=0, atol=1e-3)
        assert ours.states is not None and theirs.states is not None
        torch.testing.assert_close(ours.states.cpu(), theirs.states, rtol=0, atol=1e-3)
