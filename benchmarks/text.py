"""Tokens per second of an AR stage against transformers.generate, greedy, prompts of mixed lengths.

Both write the same number of tokens for the same token ids, end-of-sequence ignored, and turn them into text. The peer
gets its best use: one call for the whole batch, left padding, its KV cache, no logits processors.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.limits import Limits, decode_parameters
from benchmarks.measure import Options, Report, Table
from benchmarks.sides import Duel, SideProcess, duels

TINY = "asset://tiny-image/text_encoder"
# What the middle size of a laptop looks like: 133 M parameters, too many for any cache of a CPU.
MIDDLE = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
SMALL = {**MIDDLE, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
PROMPT_LENGTHS = (17, 64, 5, 120, 33, 90, 48, 9)
COLUMNS = ("case", "ours, tokens/s", "transformers, tokens/s", "ours / transformers", "equal tokens")


@dataclass(frozen=True, slots=True)
class Case:
    """vocab_size: token ids are drawn below it, and above the special ones."""

    num_sequences: int
    new_tokens: int
    vocab_size: int

    def prompts(self, repeat: int) -> list[list[int]]:
        rng = random.Random(repeat)
        lengths = [PROMPT_LENGTHS[index % len(PROMPT_LENGTHS)] for index in range(self.num_sequences)]
        return [[rng.randrange(8, self.vocab_size) for _ in range(length)] for length in lengths]


class ModelMaker:
    """Writes a random Qwen3 with a tokenizer of one word a token."""

    def make(self, folder: Path, config: dict[str, Any]) -> None:
        import torch
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.manual_seed(0)
        Qwen3ForCausalLM(Qwen3Config(**config, eos_token_id=0, pad_token_id=0)).save_pretrained(folder)
        tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(config["vocab_size"])}, "w1"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0", pad_token="w0").save_pretrained(folder)


class Ours:
    """All requests in one call of Omni.generate."""

    def __init__(self, folder: str) -> None:
        from vllm_omni import Omni

        self._omni = Omni(model=folder, device="cpu", dtype="float32", progress=False)

    def run(self, case: Case, repeat: int) -> list[list[int]]:
        from vllm_omni import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=case.new_tokens, ignore_eos=True)
        outputs = self._omni.generate([{"prompt_token_ids": ids} for ids in case.prompts(repeat)], params)
        for output in outputs:
            if output.error is not None:
                raise output.error
        return [list(output.token_ids or ()) for output in outputs]


class Transformers:
    """One padded batch."""

    def __init__(self, folder: str) -> None:
        import torch
        from transformers import AutoTokenizer, Qwen3ForCausalLM
        from transformers.utils import logging

        from vllm_omni.engine.ar.tokenizer import find_tokenizer
        from vllm_omni.utils.files import resolve_model_folder

        logging.disable_progress_bar()
        path = resolve_model_folder(folder)
        self._torch = torch
        self._model = Qwen3ForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self._model.generation_config.eos_token_id = None  # never ends early, without a processor that costs time
        self._tokenizer = AutoTokenizer.from_pretrained(find_tokenizer(path, None))

    def run(self, case: Case, repeat: int) -> list[list[int]]:
        prompts = case.prompts(repeat)
        longest = max(map(len, prompts))
        token_ids = self._torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts])
        mask = self._torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
        with self._torch.inference_mode():
            written = self._model.generate(
                token_ids,
                attention_mask=mask,
                max_new_tokens=case.new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
            )[:, longest:].tolist()
        self._tokenizer.batch_decode(written, skip_special_tokens=True)
        return [list(row) for row in written]


def run(options: Options, limits: Limits | None = None) -> Report:
    config = SMALL if options.is_quick else MIDDLE
    size = f"random Qwen3, {decode_parameters(config) / 1e6:.1f} M"
    found: list[Duel] = []
    memory: list[list[str]] = []
    with tempfile.TemporaryDirectory() as temporary:
        with SideProcess("model maker", options.threads, ModelMaker) as maker:
            maker.call("make", Path(temporary), config)
        models = [("tiny Qwen3, 1.9 M", TINY, 500, 128), (size, temporary, config["vocab_size"], 64)]
        for words, folder, vocab_size, new_tokens in models[1:] if options.is_quick else models:
            cases = [
                (f"{words}: {count} x {tokens} tokens", count * tokens, Case(count, tokens, vocab_size))
                for count, tokens in (((2, 4),) if options.is_quick else ((1, new_tokens), (16, new_tokens)))
            ]
            with (
                SideProcess("vllm_omni", options.threads, Ours, folder) as us,
                SideProcess("transformers", options.threads, Transformers, folder) as peer,
            ):
                found += duels(us, peer, cases, equal_share, options)
                memory.append([words, *(f"{side.peak_memory_mb():.0f}" for side in (us, peer))])
    return Report(
        "text",
        [
            Table("Tokens written per second, prompts included, float32", COLUMNS, [duel.cells() for duel in found]),
            Table("Peak memory, MiB", ("", "ours", "transformers"), memory),
        ],
        notes=[] if limits is None else [limits.decode_note(MIDDLE)],
        figures={"duels": [duel.figures() for duel in found], "peak_memory_mb": memory},
    )


def equal_share(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> str:
    """How much of what the peer wrote we wrote too, up to the first difference in each sequence."""
    same = 0
    for a, b in zip(ours, theirs, strict=True):
        same += next((index for index, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1]), len(b))
    return f"{same / sum(map(len, theirs)):.0%}"
