"""Tokens per second of an AR stage against transformers.generate, greedy, in the dtype that is the faster one for both.

Both write the same number of tokens for the same token ids, end-of-sequence ignored, and turn them into text. The peer
gets its best use: one call for the whole batch, left padding, its KV cache, no logits processors. Where sequences are
to be of mixed lengths it writes as many as the longest for all, and only what was asked for counts.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterable, Iterator, Sequence
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
# What Qwen3-0.6B is.
LARGE = {
    **MIDDLE,
    **{"vocab_size": 151936, "intermediate_size": 3072, "num_hidden_layers": 28, "head_dim": 128},
}
SMALL = {**MIDDLE, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
PROMPT_LENGTHS = (17, 64, 5, 120, 33, 90, 48, 9)
BLOCK = 16  # tokens
COLUMNS = ("case", "ours, tokens/s", "transformers, tokens/s", "ours / transformers", "equal tokens")


@dataclass(frozen=True, slots=True)
class Case:
    """vocab_size: token ids are drawn below it, and above the special ones."""

    prompt_lengths: tuple[int, ...]  # one for each sequence
    new_tokens: tuple[int, ...]
    vocab_size: int

    @classmethod
    def alike(cls, count: int, new_tokens: int, vocab_size: int) -> Case:
        lengths = tuple(PROMPT_LENGTHS[index % len(PROMPT_LENGTHS)] for index in range(count))
        return cls(lengths, (new_tokens,) * count, vocab_size)

    @classmethod
    def mixed(cls, count: int, vocab_size: int) -> Case:
        """Prompts of 16 to 256 tokens, 16 to 128 new ones."""
        rng = random.Random(count)
        lengths = [(rng.randint(16, 256), rng.randint(16, 128)) for _ in range(count)]
        return cls(tuple(prompt for prompt, _ in lengths), tuple(new for _, new in lengths), vocab_size)

    def prompts(self, repeat: int) -> list[list[int]]:
        rng = random.Random(repeat)
        return [[rng.randrange(8, self.vocab_size) for _ in range(length)] for length in self.prompt_lengths]

    @property
    def num_blocks(self) -> int:
        """Of the KV pool, while all sequences are at their ends."""
        lengths = zip(self.prompt_lengths, self.new_tokens, strict=True)
        return sum(-(-(prompt + new) // BLOCK) for prompt, new in lengths)


@dataclass(frozen=True, slots=True)
class Contest:
    """One model in one dtype."""

    words: str
    folder: str
    dtype: str
    cases: dict[str, Case]


class ModelMaker:
    """Writes a random Qwen3 with a tokenizer of one word a token."""

    def make(self, folder: Path, config: dict[str, Any], dtype: str) -> None:
        import torch
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(Qwen3Config(**config, eos_token_id=0, pad_token_id=0))
        model.to(getattr(torch, dtype)).save_pretrained(folder)
        tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(config["vocab_size"])}, "w1"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0", pad_token="w0").save_pretrained(folder)


class Ours:
    """All requests in one call of Omni.generate."""

    def __init__(self, folder: str, dtype: str, overrides: Sequence[str] = ()) -> None:
        from vllm_omni import Omni

        self._omni = Omni(model=folder, device="cpu", dtype=dtype, overrides=overrides, progress=False)

    def run(self, case: Case, repeat: int) -> list[list[int]]:
        return self.write(case.prompts(repeat), case.new_tokens)

    def write(self, prompts: Sequence[Sequence[int]], new_tokens: Sequence[int]) -> list[list[int]]:
        from vllm_omni import SamplingParams

        params = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for count in new_tokens]
        outputs = self._omni.generate([{"prompt_token_ids": ids} for ids in prompts], params)
        for output in outputs:
            if output.error is not None:
                raise output.error
        return [list(output.token_ids or ()) for output in outputs]


class Transformers:
    """One padded batch."""

    def __init__(self, folder: str, dtype: str) -> None:
        import torch
        from transformers import AutoTokenizer, Qwen3ForCausalLM
        from transformers.utils import logging

        from vllm_omni.engine.ar.tokenizer import find_tokenizer
        from vllm_omni.utils.files import resolve_model_folder

        logging.disable_progress_bar()
        path = resolve_model_folder(folder)
        self._torch = torch
        self._model = Qwen3ForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
        self._model.generation_config.eos_token_id = None  # never ends early, without a processor that costs time
        self._tokenizer = AutoTokenizer.from_pretrained(find_tokenizer(path, None))

    def run(self, case: Case, repeat: int) -> list[list[int]]:
        written = self.write(case.prompts(repeat), case.new_tokens)
        self._tokenizer.batch_decode(written, skip_special_tokens=True)
        return written

    def write(self, prompts: Sequence[list[int]], new_tokens: Sequence[int]) -> list[list[int]]:
        longest = max(map(len, prompts))
        token_ids = self._torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts])
        mask = self._torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
        with self._torch.inference_mode():
            written = self._model.generate(
                token_ids,
                attention_mask=mask,
                max_new_tokens=max(new_tokens),
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
            )[:, longest:].tolist()
        return [row[:count] for row, count in zip(written, new_tokens, strict=True)]


def pool_of(cases: Iterable[Case]) -> list[str]:
    """The setting of a KV pool for the largest of the cases. By default it holds as many sequences as may run, each of
    the length that the model takes.
    """
    return [f"text.block_size={BLOCK}", f"text.num_blocks={max(case.num_blocks for case in cases)}"]


def run(options: Options, limits: Limits | None = None) -> Report:
    found: list[Duel] = []
    memory: list[list[str]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for contest in contests(Path(temporary), options):
            cases = [
                (f"{contest.words}, {contest.dtype}: {name}", sum(case.new_tokens), case)
                for name, case in contest.cases.items()
            ]
            pool = pool_of(contest.cases.values())
            with (
                SideProcess("vllm_omni", options.threads, Ours, contest.folder, contest.dtype, pool) as us,
                SideProcess("transformers", options.threads, Transformers, contest.folder, contest.dtype) as peer,
            ):
                found += duels(us, peer, cases, equal_share, options)
                sizes = (f"{side.peak_memory_mb():.0f}" for side in (us, peer))
                memory.append([f"{contest.words}, {contest.dtype}", *sizes])
    return Report(
        "text",
        [
            Table("Tokens written per second, prompts included", COLUMNS, [duel.cells() for duel in found]),
            Table("Peak memory, MiB", ("", "ours", "transformers"), memory),
        ],
        notes=[] if limits is None else [limits.decode_note(MIDDLE, "float32"), limits.decode_note(LARGE, "bfloat16")],
        figures={"duels": [duel.figures() for duel in found], "peak_memory_mb": memory},
    )


def contests(folder: Path, options: Options) -> Iterator[Contest]:
    """The models are written when their turn comes, and in each dtype that one is measured in."""
    if options.is_quick:
        yield _made(folder, SMALL, "float32", {"2 x 4 tokens": Case.alike(2, 4, SMALL["vocab_size"])}, options)
        return
    tiny = {f"{count} x 128 tokens": Case.alike(count, 128, 500) for count in (1, 16)}
    for dtype in ("float32", "bfloat16"):
        yield Contest("tiny Qwen3, 1.9 M", TINY, dtype, tiny)
    middle = {f"{count} x 64 tokens": Case.alike(count, 64, MIDDLE["vocab_size"]) for count in (1, 16)}
    for dtype in ("float32", "bfloat16"):
        yield _made(folder, MIDDLE, dtype, middle, options)
    large = {f"{count} x 32 tokens": Case.alike(count, 32, LARGE["vocab_size"]) for count in (1, 8, 32)}
    large["32 of mixed lengths"] = Case.mixed(32, LARGE["vocab_size"])
    yield _made(folder, LARGE, "bfloat16", large, options)


def _made(folder: Path, config: dict[str, Any], dtype: str, cases: dict[str, Case], options: Options) -> Contest:
    target = written_model(folder, config, dtype, options.threads)
    return Contest(f"random Qwen3, {decode_parameters(config) / 1e6:.1f} M", str(target), dtype, cases)


def written_model(folder: Path, config: dict[str, Any], dtype: str, threads: int) -> Path:
    """A new folder in `folder`."""
    target = folder / f"{config['num_hidden_layers']}-{dtype}"
    with SideProcess("model maker", threads, ModelMaker) as maker:
        maker.call("make", target, config, dtype)
    return target


def equal_share(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> str:
    """How much of what the peer wrote we wrote too, up to the first difference in each sequence."""
    same = 0
    for a, b in zip(ours, theirs, strict=True):
        same += next((index for index, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1]), len(b))
    return f"{same / sum(map(len, theirs)):.0%}"
