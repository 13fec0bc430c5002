"""Tiny random language models of transformers' classes, and a loop that writes with them: scheduler and runner alone,
without an engine, a tokenizer or a sampler.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from support.attention import find_backend
from torch import Tensor

from vllm_omni.core.ar.block_manager import BlockManager
from vllm_omni.core.ar.scheduler import ARScheduler
from vllm_omni.core.ar.sequence import Sequence
from vllm_omni.layers.shard import WHOLE, Shard
from vllm_omni.utils.device import StepGraphs
from vllm_omni.worker.ar.language_model import (
    LanguageModel,
    LanguageModelConfig,
    LanguageModelFolder,
)
from vllm_omni.worker.ar.model_runner import ModelRunner
from vllm_omni.worker.parallel.decoder import DecoderLead

CPU = torch.device("cpu")
PROMPT = [1, 60, 70, 80, 90, 100, 71, 81, 91, 60, 70, 80, 5, 6, 7]
TINY: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # wide enough that greedy texts differ
    "eos_token_id": 2,
}


def save_random_model(build: Any, config: Any, folder: Path, seed: int = 0) -> Path:
    """A checkpoint as transformers writes it; norms and biases are random, too."""
    torch.manual_seed(seed)
    model = build(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "bias")):
            torch.nn.init.normal_(parameter, 1.0 if name.endswith("norm.weight") else 0.0, 0.2)
    model.save_pretrained(folder)
    return folder


def load_model(folder: Path) -> LanguageModel:
    return LanguageModelFolder.open(folder).load(CPU, torch.float32)


def read_config(folder: Path) -> LanguageModelConfig:
    return LanguageModelFolder.open(folder).config


@dataclass
class Written:
    """What one prompt became."""

    token_ids: list[int]  # prompt and written tokens
    logits: list[Tensor] = field(default_factory=list)  # [V] for each written token
    states: Tensor | None = None  # [T, layers * D] of all tokens that were computed


def write(
    model: LanguageModel,
    prompts: Many[list[int]],
    num_tokens: int,
    *,
    tapped_layers: Many[int] = (),
    max_num_batched_tokens: int = 7,
    attention: str = "sdpa",
    decode_buckets: Many[int] = (),
    graphs: StepGraphs | None = None,
    device: torch.device = CPU,
    shard: Shard = WHOLE,
    lead: DecoderLead | None = None,
) -> list[Written]:
    """Greedy tokens for every prompt, all in one batch. shard, lead: of a model whose decoder several ranks share."""
    blocks = BlockManager(64, 4)
    scheduler = ARScheduler(blocks, len(prompts), max_num_batched_tokens)
    runner = ModelRunner(
        model,
        num_blocks=64,
        block_size=4,
        max_num_seqs=len(prompts),
        tapped_layers=tapped_layers,
        can_sample=True,
        device=device,
        dtype=torch.float32,
        attention=find_backend(attention),
        decode_buckets=decode_buckets,
        graphs=graphs,
        shard=shard,
        lead=lead,
    )
    sequences = [
        Sequence(number, f"r{number}", list(ids), max_tokens=len(ids) + num_tokens)
        for number, ids in enumerate(prompts)
    ]
    written = [Written(sequence.token_ids) for sequence in sequences]
    for sequence in sequences:
        scheduler.add(sequence)
    while chunks := scheduler.schedule():
        logits = runner.run(chunks).logits.clone()  # they are good until the next step
        for chunk in chunks:
            scheduler.advance(chunk)
        writing = [chunk.sequence for chunk in chunks if chunk.samples]
        for sequence, row in zip(writing, logits, strict=True):
            own = written[sequence.sequence_id]
            own.logits.append(row)
            sequence.append(int(row.argmax()))
            if len(own.logits) == num_tokens:
                if tapped_layers:
                    own.states = runner.tapped_states(sequence, tapped_layers, 0, sequence.num_computed_tokens)
                scheduler.remove(sequence)
        scheduler.check_integrity()
    return written


def assert_equals_transformers(build: Any, folder: Path, num_tokens: int = 24) -> None:
    """Greedy tokens, log probabilities and all hidden states of a folder, ours against those of the class `build`."""
    published = build.from_pretrained(folder).eval()
    layers = list(range(published.config.get_text_config().num_hidden_layers + 1))
    written = write(load_model(folder), [PROMPT], num_tokens, tapped_layers=layers)[0]
    with torch.no_grad():
        expected = published.generate(
            torch.tensor([PROMPT]), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0]
        output = published(expected[None], output_hidden_states=True)
    assert written.token_ids == expected.tolist()
    theirs = output.logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
    torch.testing.assert_close(torch.stack(written.logits).log_softmax(-1), theirs, rtol=0, atol=1e-4)
    states = torch.cat([states[0, :-1] for states in output.hidden_states], dim=-1)
    assert written.states is not None and written.states.shape == states.shape
    assert (written.states - states).norm() <= 1e-4 * states.norm()
