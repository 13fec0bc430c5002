"""What a GPU gives, at published shapes with random weights: `python -m benchmarks.gpu --json FILE`; best through
`tools/gpu_check.sh`, which runs the tests on the GPU first.

Language model: the workload of nano-vllm's bench.py (256 sequences, 100 to 1024 tokens in, as many out) at Qwen3-0.6B's
shape, here greedy; and single decode speeds by attention backend, with and without graphs. Pictures: Z-Image at 1024
pixels, nine steps. The file is written anew after every case, so that a run that is cut short leaves what it had.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_shapes import DRY, PROMPT, PUBLISHED, Size
from benchmarks.measure import machine, median
from benchmarks.random_weights import qwen3_folder, z_image_folder
from benchmarks.report import write_json
from vllm_omni import DiffusionParams, Omni, SamplingParams
from vllm_omni.errors import OmniError
from vllm_omni.layers.attention.base import AttentionUse
from vllm_omni.layers.attention.choice import choose_attention


class Bench:
    """One machine with one size of everything."""

    def __init__(self, device: str, size: Size, temporary: Path) -> None:
        self.device, self.size, self._temporary = torch.device(device), size, temporary
        self._memory_gb = 8.0
        if self.device.type == "cuda":
            self._memory_gb = 0.85 * torch.cuda.mem_get_info(self.device)[0] / 2**30

    def cases(self) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        """(name, what measures it), the most telling first."""
        yield "nano-vllm's workload, attention auto", self.mixed
        yield "pictures", self.pictures
        for name, keys in self._variants():
            yield f"decode, {name}", lambda keys=keys: self.decode(keys)  # type: ignore[misc]

    def mixed(self) -> dict[str, Any]:
        """Tokens per second of many sequences of random lengths."""
        size, rng = self.size, random.Random(0)
        lengths = [(rng.randint(*size.lengths), rng.randint(*size.lengths)) for _ in range(size.num_sequences)]
        prompts = [self._prompt(length, index) for index, (length, _) in enumerate(lengths)]
        params = [self._greedy(length) for _, length in lengths]
        with self._language_model({"max_num_seqs": size.num_sequences, "max_num_batched_tokens": 16384}) as omni:
            omni.generate(prompts[:4], self._greedy(4))
            took_s, outputs = self._timed(lambda: omni.generate(prompts, params))
        num_tokens = sum(len(output.token_ids or ()) for output in outputs)
        assert num_tokens == sum(length for _, length in lengths)
        return {"tokens": num_tokens, "s": took_s, "tokens_per_s": num_tokens / took_s}

    def decode(self, keys: dict[str, Any]) -> dict[str, Any]:
        """Tokens per second of sequences that all write equally many."""
        size, found = self.size, {}
        with self._language_model({"max_num_seqs": max(size.decode_batches), **keys}) as omni:
            for count in size.decode_batches:
                prompts = [self._prompt(size.lengths[0], index) for index in range(count)]
                few, many = ([self._greedy(tokens)] * count for tokens in (1, 1 + size.decode_tokens))
                omni.generate(prompts, many)
                differences = []
                for _ in range(size.repeats):
                    short_s, _ = self._timed(lambda p=prompts, few=few: omni.generate(p, few))  # type: ignore[misc]
                    long_s, _ = self._timed(lambda p=prompts, many=many: omni.generate(p, many))  # type: ignore[misc]
                    differences.append(max(long_s - short_s, 1e-9))
                found[f"{count} sequences, tokens/s"] = count * size.decode_tokens / median(differences)
        return found

    def pictures(self) -> dict[str, Any]:
        """Seconds of one picture and of four, by stage."""
        size = self.size
        found: dict[str, Any] = {}
        folder = z_image_folder(self._temporary / "z-image", **size.z_image)
        keys = [f"resources.max_memory_gb={self._memory_gb}"]
        with Omni("z_image", model=str(folder), device=str(self.device), overrides=keys, progress=False) as omni:
            params = DiffusionParams(
                height=size.pixels, width=size.pixels, num_inference_steps=size.steps, guidance_scale=0.0, seed=1
            )
            omni.generate(PROMPT, params)
            for count in (1, 4):
                times = []
                for repeat in range(size.repeats):
                    prompts = [f"{PROMPT} {count} {repeat} {index}" for index in range(count)]
                    took_s, outputs = self._timed(lambda prompts=prompts: omni.generate(prompts, params))  # type: ignore[misc]
                    times.append(took_s)
                found[f"{count} pictures, s"] = median(times)
                stages = {stage: metrics["ran_s"] for stage, metrics in outputs[0].metrics.items()}
                found[f"{count} pictures, the last by stage, s"] = stages
        return found

    def _variants(self) -> Iterator[tuple[str, dict[str, Any]]]:
        head_dim = int(self.size.language_model["head_dim"])
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        for attention in ("sdpa", "triton", "flash"):
            block_size = 256 if attention == "flash" else 16
            try:
                choose_attention(attention, AttentionUse(self.device, dtype, block_size, head_dim))
            except OmniError as error:
                print(f"left out: {error}")
                continue
            yield attention, {"attention": attention, "block_size": block_size}
            if attention != "sdpa" and self.device.type == "cuda":
                yield (
                    f"{attention}, no graphs",
                    {
                        "attention": attention,
                        "block_size": block_size,
                        "cuda_graphs": "false",
                    },
                )

    def _language_model(self, keys: dict[str, Any]) -> Omni:
        folder = self._temporary / "language-model"
        if not folder.exists():
            qwen3_folder(folder, self.size.language_model)
        overrides = [
            f"resources.max_memory_gb={self._memory_gb}",
            "scheduler.max_queue_size=1024",
            "scheduler.max_running=1024",
            f"text.max_model_len={self.size.max_model_len}",
            "text.prefix_caching=false",
            *(f"text.{key}={value}" for key, value in keys.items()),
        ]
        return Omni(model=str(folder), device=str(self.device), overrides=overrides, progress=False)

    def _prompt(self, length: int, seed: int) -> dict[str, Any]:
        rng = random.Random(seed)
        vocab_size = int(self.size.language_model["vocab_size"])
        return {"prompt_token_ids": [rng.randrange(8, min(vocab_size, 10000)) for _ in range(length)]}

    @staticmethod
    def _greedy(num_tokens: int) -> SamplingParams:
        return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)

    def _timed(self, work: Callable[[], Any]) -> tuple[float, Any]:
        start = time.perf_counter()
        outputs = work()
        took_s = time.perf_counter() - start
        for output in outputs:
            if output.error is not None:
                raise output.error
        return took_s, outputs


def run_cases(bench: Bench, content: dict[str, Any], path: Path, budget_s: float) -> None:
    """One after the other, while there is time; a case that fails leaves its error."""
    start = time.perf_counter()
    for name, measure in bench.cases():
        if time.perf_counter() - start > budget_s:
            content["cases"][name] = {"left_out": f"the budget of {budget_s:g} s was spent"}
        else:
            print(f"{name} ...", flush=True)
            try:
                content["cases"][name] = measure()
            except Exception as error:
                content["cases"][name] = {"error": f"{type(error).__name__}: {error}"}
            print(f"  {content['cases'][name]}", flush=True)
        write_json(path, content)


def tests_found(path: Path | None) -> dict[str, Any] | None:
    """Counts of a JUnit file, and the names of what failed."""
    if path is None or not path.is_file():
        return None
    suites = list(ElementTree.parse(path).iter("testsuite"))
    counts = {key: sum(int(s.get(key, 0)) for s in suites) for key in ("tests", "failures", "errors", "skipped")}
    failed = [
        f"{case.get('classname')}.{case.get('name')}"
        for suite in suites
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {**counts, "failed": failed}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where the figures go")
    parser.add_argument("--budget", type=float, default=240.0, metavar="S", help="no case begins after this (240)")
    parser.add_argument("--tests", type=Path, metavar="FILE", help="JUnit results that go into the file")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU: shows that it runs")
    args = parser.parse_args(argv)
    device = "cpu" if args.dry_run else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("this machine has no CUDA device; --dry-run shows on a CPU that everything runs")
    content: dict[str, Any] = {
        "machine": {**machine(torch.get_num_threads()), "gpu": _gpu_name(device)},
        "is_dry_run": args.dry_run,
        "tests": tests_found(args.tests),
        "cases": {},
    }
    write_json(args.json, content)
    with tempfile.TemporaryDirectory() as temporary:
        run_cases(Bench(device, DRY if args.dry_run else PUBLISHED, Path(temporary)), content, args.json, args.budget)
    return int(any("error" in case for case in content["cases"].values()))


def _gpu_name(device: str) -> str | None:
    return None if device == "cpu" else f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"


if __name__ == "__main__":
    sys.exit(main())
