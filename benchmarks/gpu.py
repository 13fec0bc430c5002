"""What a GPU gives, at published shapes with random weights: `python -m benchmarks.gpu --json FILE`; best through
`tools/gpu_check.sh`, which runs the tests on the GPU first.

Language model: the workload of nano-vllm's bench.py (256 sequences, 100 to 1024 tokens in, as many out) at Qwen3-0.6B's
shape, greedy and drawn at temperature 0.6 as there; single decode speeds by attention backend, with and without graphs,
in fp8, and of transformers. Pictures at 1024 pixels: Z-Image in nine steps, also in fp8, with weights in the host's
memory, and of diffusers; FLUX.2 [klein] 4B in four. Speech: Qwen3-TTS 0.6B, with graphs and
without. `--only WORD` runs the cases with that word in their names. The file is written anew after every case, so that
a run that is cut short leaves what it had.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_peers import DiffusersPainter, TransformersWriter, forget
from benchmarks.gpu_shapes import DRY, PROMPT, PUBLISHED, Size
from benchmarks.gpu_speech import Speaker, speech_folder
from benchmarks.measure import machine, median
from benchmarks.random_weights import klein_folder, qwen3_folder, z_image_folder
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
        is_cuda = self.device.type == "cuda"
        yield "nano-vllm's workload, attention auto", lambda: self.mixed(0.0)
        yield "nano-vllm's workload, drawn", lambda: self.mixed(0.6)
        yield "pictures", lambda: self.pictures("z_image", self._z_image, (1, 4))
        yield "pictures, diffusers", lambda: self.pictures_of_diffusers(self._z_image, (1, 4))
        yield "decode, auto", lambda: self.decode({})
        yield "decode, transformers", self.decode_of_transformers
        if is_cuda:
            yield "pictures, fp8", lambda: self.pictures("z_image", self._z_image, (1, 4), "image.quantization=fp8")
            offload = [f"{stage}.offload=weights" for stage in ("image", "text", "negative")]
            yield "pictures, offload", lambda: self.pictures("z_image", self._z_image, (1,), *offload)
        yield "FLUX.2 [klein] 4B", lambda: self.pictures("flux2_klein", self._klein, (1, 4), steps=4)
        if is_cuda:
            yield "decode, fp8", lambda: self.decode({"quantization": "fp8"})
        yield "speech", self.speech
        if is_cuda:
            yield "speech, no graphs", lambda: self.speech("talker.cuda_graphs=false")
        for name, keys in self._variants():
            yield f"decode, {name}", lambda keys=keys: self.decode(keys)  # type: ignore[misc]

    def mixed(self, temperature: float) -> dict[str, Any]:
        """Tokens per second of many sequences of random lengths."""
        size, rng = self.size, random.Random(0)
        lengths = [(rng.randint(*size.lengths), rng.randint(*size.lengths)) for _ in range(size.num_sequences)]
        prompts = [self._prompt(length, index) for index, (length, _) in enumerate(lengths)]
        params = [self._writing(length, temperature) for _, length in lengths]
        with self._language_model({"max_num_seqs": size.num_sequences, "max_num_batched_tokens": 16384}) as omni:
            omni.generate(prompts[:4], self._writing(4, temperature))
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
                few, many = ([self._writing(tokens)] * count for tokens in (1, 1 + size.decode_tokens))
                omni.generate(prompts, many)
                differences = []
                for _ in range(size.repeats):
                    short_s, _ = self._timed(lambda p=prompts, few=few: omni.generate(p, few))  # type: ignore[misc]
                    long_s, _ = self._timed(lambda p=prompts, many=many: omni.generate(p, many))  # type: ignore[misc]
                    differences.append(max(long_s - short_s, 1e-9))
                found[tokens_per_s(count)] = count * size.decode_tokens / median(differences)
        return found

    def decode_of_transformers(self) -> dict[str, Any]:
        """The same by `generate`."""
        size, writer = self.size, TransformersWriter(self._language_model_folder(), self.device)
        found = {}
        for count in size.decode_batches[1:]:
            prompts = [self._prompt(size.lengths[0], index)["prompt_token_ids"] for index in range(count)]
            found[tokens_per_s(count)] = writer.decode_rate(prompts, size.peer_tokens, size.repeats)
        return found

    def pictures(
        self, config: str, folder: Callable[[], Path], counts: Sequence[int], *keys: str, steps: int | None = None
    ) -> dict[str, Any]:
        """Seconds of one picture and of several, by stage, and the most memory that they took."""
        size = self.size
        found: dict[str, Any] = {}
        pools = ("text.kv_memory_mb=512", "negative.kv_memory_mb=512")
        overrides = [f"resources.max_memory_gb={self._memory_gb}", *pools, *keys]
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with Omni(config, model=str(folder()), device=str(self.device), overrides=overrides, progress=False) as omni:
            params = DiffusionParams(
                height=size.pixels,
                width=size.pixels,
                num_inference_steps=min(steps or size.steps, size.steps),
                guidance_scale=0.0,
                seed=1,
            )
            self._timed(lambda: omni.generate(PROMPT, params))
            for count in counts:
                times = []
                for repeat in range(size.repeats):
                    prompts = [f"{PROMPT} {count} {repeat} {index}" for index in range(count)]
                    took_s, outputs = self._timed(lambda prompts=prompts: omni.generate(prompts, params))  # type: ignore[misc]
                    times.append(took_s)
                found[pictures_s(count)] = median(times)
                stages = {stage: metrics["ran_s"] for stage, metrics in outputs[0].metrics.items()}
                found[f"{count} pictures, the last by stage, s"] = stages
            if self.device.type == "cuda":
                found["most memory, GiB"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        return found

    def speech(self, *keys: str) -> dict[str, Any]:
        """Frames per second, first sound and real-time factor of Qwen3-TTS, one speech and several at once."""
        size, found = self.size, dict[str, float]()
        memory = f"resources.max_memory_gb={self._memory_gb}"
        with Speaker(self._speech(), str(self.device), memory, *keys) as speaker:
            for count in size.speeches:
                found |= speaker.figures(count, size.frames, size.repeats)
        return found

    def pictures_of_diffusers(self, folder: Callable[[], Path], counts: Sequence[int]) -> dict[str, Any]:
        """The same by diffusers' ZImagePipeline."""
        size, painter = self.size, DiffusersPainter(folder(), self.device)
        sides = {"height": size.pixels, "width": size.pixels}
        return {
            pictures_s(count): painter.seconds(
                [f"{PROMPT} {count} {index}" for index in range(count)],
                1,
                num_inference_steps=size.steps,
                guidance_scale=0.0,
                **sides,
            )
            for count in counts
        }

    def _variants(self) -> Iterator[tuple[str, dict[str, Any]]]:
        head_dim = int(self.size.language_model["head_dim"])
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        for attention in ("flash", "triton", "sdpa"):
            block_size = 256 if attention == "flash" else 16
            try:
                choose_attention(attention, AttentionUse(self.device, dtype, block_size, head_dim))
            except OmniError as error:
                print(f"left out: {error}")
                continue
            keys = {"attention": attention, "block_size": block_size}
            yield attention, keys
            if attention != "sdpa" and self.device.type == "cuda":
                yield f"{attention}, no graphs", {**keys, "cuda_graphs": "false"}

    def _language_model(self, keys: dict[str, Any]) -> Omni:
        overrides = [
            f"resources.max_memory_gb={self._memory_gb}",
            "scheduler.max_queue_size=1024",
            "scheduler.max_running=1024",
            f"text.max_model_len={self.size.max_model_len}",
            "text.prefix_caching=false",
            *(f"text.{key}={value}" for key, value in keys.items()),
        ]
        folder = str(self._language_model_folder())
        return Omni(model=folder, device=str(self.device), overrides=overrides, progress=False)

    def _language_model_folder(self) -> Path:
        folder = self._temporary / "language-model"
        return folder if folder.exists() else qwen3_folder(folder, self.size.language_model)

    def _z_image(self) -> Path:
        folder = self._temporary / "z-image"
        return folder if folder.exists() else z_image_folder(folder, **self.size.z_image)

    def _speech(self) -> Path:
        folder = self._temporary / "speech"
        return folder if folder.exists() else speech_folder(folder, **self.size.speech)

    def _klein(self) -> Path:
        text_encoder = self._z_image() / "text_encoder"
        return klein_folder(self._temporary / "klein", **self.size.klein, text_encoder=text_encoder)

    def _prompt(self, length: int, seed: int) -> dict[str, Any]:
        rng = random.Random(seed)
        vocab_size = int(self.size.language_model["vocab_size"])
        return {"prompt_token_ids": [rng.randrange(8, min(vocab_size, 10000)) for _ in range(length)]}

    @staticmethod
    def _writing(num_tokens: int, temperature: float = 0.0) -> SamplingParams:
        return SamplingParams(temperature=temperature, seed=0, max_tokens=num_tokens, ignore_eos=True)

    def _timed(self, work: Callable[[], Any]) -> tuple[float, Any]:
        start = time.perf_counter()
        outputs = work()
        took_s = time.perf_counter() - start
        for output in outputs:
            if output.error is not None:
                raise output.error
        return took_s, outputs


def tokens_per_s(count: int) -> str:
    return f"{count} sequences, tokens/s"


def pictures_s(count: int) -> str:
    return f"{count} pictures, s"


def ratios(cases: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """What was measured on two sides, or in two ways -> how many times as fast the first is."""
    pairs = {
        "transformers": ("decode, auto", "decode, transformers"),
        "diffusers": ("pictures", "pictures, diffusers"),
        "bfloat16, pictures in fp8": ("pictures, fp8", "pictures"),
        "greedy tokens, drawn ones": ("nano-vllm's workload, drawn", "nano-vllm's workload, attention auto"),
        "bfloat16, decode in fp8": ("decode, fp8", "decode, auto"),
        "kept weights, pictures with offload": ("pictures, offload", "pictures"),
        "without graphs": ("speech", "speech, no graphs"),
    }
    found = {}
    for words, names in pairs.items():
        ours, theirs = (cases.get(name, {}) for name in names)
        for key in ours.keys() & theirs.keys():
            if key.endswith(("tokens/s", "tokens_per_s", "frames/s", "pictures, s")):
                ratio = ours[key] / theirs[key]
                name = ": ".join(part for part in (words, key.rpartition(", ")[0]) if part)
                found[f"as fast as {name}"] = 1 / ratio if key.endswith(", s") else ratio
    return dict(sorted(found.items()))


def run_cases(bench: Bench, content: dict[str, Any], path: Path, budget_s: float, only: str = "") -> None:
    """One after the other, while there is time; a case that fails leaves its error. only: a word of their names."""
    start = time.perf_counter()
    for name, measure in bench.cases():
        if only not in name:
            continue
        if time.perf_counter() - start > budget_s:
            content["cases"][name] = {"left_out": f"the budget of {budget_s:g} s was spent"}
        else:
            print(f"{name} ...", flush=True)
            begun = time.perf_counter()
            try:
                content["cases"][name] = measure()
            except Exception as error:
                content["cases"][name] = {"error": f"{type(error).__name__}: {error}"}
            content.setdefault("whole case, s", {})[name] = time.perf_counter() - begun
            forget()
            print(f"  {content['cases'][name]}", flush=True)
        content["ratios"] = ratios(content["cases"])
        write_json(path, content)
    print(*(f"{ratio:6.2f} times {words}" for words, ratio in content.get("ratios", {}).items()), sep="\n")


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
    parser.add_argument("--only", default="", metavar="WORD", help="cases with this word in their names")
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
        bench = Bench(device, DRY if args.dry_run else PUBLISHED, Path(temporary))
        run_cases(bench, content, args.json, args.budget, args.only)
    return int(any("error" in case for case in content["cases"].values()))


def _gpu_name(device: str) -> str | None:
    return None if device == "cpu" else f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"


if __name__ == "__main__":
    sys.exit(main())
