"""What this machine allows: its peak in matrix products and its memory bandwidth, and what they bound.

A picture is bound by its arithmetic (its weights stay in the caches), a decode step by reading every weight once or by
its arithmetic, whichever takes longer. Attention over the few tokens so far is left out of the latter.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.measure import Options, Report, Table
from benchmarks.sides import SideProcess

SIZES = {"float32": 4, "bfloat16": 2}  # bytes of a number
DTYPES = tuple(SIZES)
GIGA = 1e9
BATCHES = (1, 8, 32)
READ_FLOATS = 2**26  # 256 MiB, beyond any cache


@dataclass(frozen=True, slots=True)
class Limits:
    """gemm_gflop_s: by dtype, the better of torch's own way (plain_gflop_s) and the package's. picture_gflop: one
    128x128 picture at the shipped config's defaults.
    """

    threads: int
    gemm_gflop_s: Mapping[str, float]
    plain_gflop_s: Mapping[str, float]
    read_gb_s: float
    picture_gflop: float

    def pictures_per_s(self, dtype: str) -> float:
        return self.gemm_gflop_s[dtype] / self.picture_gflop

    def decode_steps_per_s(self, parameters: int, batch: int, dtype: str) -> float:
        """Steps of a language model that reads `parameters` weights and multiplies by all of them."""
        reading_s = parameters * SIZES[dtype] / (self.read_gb_s * GIGA)
        computing_s = 2 * parameters * batch / (self.gemm_gflop_s[dtype] * GIGA)
        return 1 / max(reading_s, computing_s)

    def prefill_tokens_per_s(self, parameters: int, dtype: str) -> float:
        """Tokens of prompts, which are multiplied by `parameters` weights."""
        return self.gemm_gflop_s[dtype] * GIGA / (2 * parameters)

    def picture_note(self, dtype: str) -> str:
        return (
            f"Limit: a 128x128 picture takes {self.picture_gflop:.2f} GFLOP (guidance and caches off), this machine "
            f"multiplies {dtype} matrices at {self.gemm_gflop_s[dtype]:.0f} GFLOP/s with {self.threads} threads: at "
            f"most {self.pictures_per_s(dtype):.1f} pictures/s."
        )

    def decode_note(self, config: Mapping[str, Any], dtype: str) -> str:
        parameters = decode_parameters(config)
        gigabytes = parameters * SIZES[dtype] / GIGA
        bounds = (
            f"{batch} at once {batch * self.decode_steps_per_s(parameters, batch, dtype):.0f} tokens/s"
            for batch in BATCHES
        )
        return (
            f"Limit: {parameters / 1e6:.0f} M parameters in {dtype} take {gigabytes:.2f} GB, read once a step at "
            f"{self.read_gb_s:.1f} GB/s, and {2 * parameters / GIGA:.2f} GFLOP a token at "
            f"{self.gemm_gflop_s[dtype]:.0f} GFLOP/s: decoding alone, at most {', '.join(bounds)}."
        )


class Probe:
    """Measures this process's machine."""

    def gemm_gflop_s(self, dtype: str, size: int, seconds: float) -> tuple[float, float]:
        """The best rates of square products: by torch's own way, by that of the package's linear layers."""
        import torch

        from vllm_omni.layers.linear import Linear

        a, b = (torch.randn(size, size).to(getattr(torch, dtype)) for _ in range(2))
        layer = Linear(size, size, bias=False).to(a.dtype)
        layer.pack()
        with torch.inference_mode():
            plain, packed = (fastest(work, seconds) for work in (lambda: a @ b, lambda: layer(a)))
        return 2 * size**3 / plain / GIGA, 2 * size**3 / packed / GIGA

    def read_gb_s(self, num_floats: int, seconds: float) -> float:
        """The best rate of reading float32 once."""
        import torch

        values = torch.ones(num_floats)
        return num_floats * 4 / fastest(values.sum, seconds) / GIGA

    def picture_gflop(self) -> float:
        """Of one picture at the config's defaults without guidance.

        Counted on the plain path: what the kernels compute is no operation of torch, and would not be counted.
        """
        from unittest.mock import patch

        import torch
        from torch.utils.flop_counter import FlopCounterMode

        from vllm_omni import DiffusionParams, Omni
        from vllm_omni.layers.native import library

        counted = {
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
            torch.ops.mkldnn._linear_pointwise: linear_flops,
        }
        with (
            patch.object(library, "built_variants", dict),
            Omni("tiny_image.yaml", device="cpu", dtype="float32", progress=False) as omni,
        ):
            counter = FlopCounterMode(display=False, custom_mapping=counted)
            with counter:
                omni.generate("a red circle", DiffusionParams(seed=0, guidance_scale=0.0))
        return counter.get_total_flops() / GIGA


def attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Shapes [B, H, L, D] -> two products."""
    batch, heads, num_queries, head_dim = query
    return int(4 * batch * heads * num_queries * key[2] * head_dim)


def linear_flops(x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    """Shapes [..., in] and [out, in]."""
    return int(2 * math.prod(x) * weight[0])


def fastest(work: Callable[[], Any], seconds: float) -> float:
    """Seconds of the fastest run among those that fit into `seconds`, at least three but where one is far too slow."""
    times: list[float] = []
    while sum(times) < seconds or (len(times) < 3 and sum(times) < 5 * seconds):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def layer_parameters(config: Mapping[str, Any]) -> int:
    """Weights that every token of a dense Qwen3 is multiplied by: its layers."""
    width, head = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    layer = width * (2 * queries + 2 * keys) + 3 * width * config["intermediate_size"]
    return int(config["num_hidden_layers"] * layer)


def decode_parameters(config: Mapping[str, Any]) -> int:
    """Those of a decode step: its layers and its head."""
    return layer_parameters(config) + int(config["vocab_size"] * config["hidden_size"])


def measure(options: Options) -> Limits:
    seconds, size, floats = (0.02, 256, 2**20) if options.is_quick else (2.0, 2048, READ_FLOATS)
    with SideProcess("limits", options.threads, Probe) as probe:
        gemm = {dtype: probe.call("gemm_gflop_s", dtype, size, seconds)[1] for dtype in DTYPES}
        read = probe.call("read_gb_s", floats, seconds)[1]
        picture_gflop = probe.call("picture_gflop")[1]
    best = {dtype: max(rates) for dtype, rates in gemm.items()}
    plain = {dtype: rates[0] for dtype, rates in gemm.items()}
    return Limits(options.threads, best, plain, read, picture_gflop)


def run(options: Options, limits: Limits | None = None) -> Report:
    from benchmarks.text import MIDDLE

    limits = limits or measure(options)
    rows = [[f"matrix products, {dtype}", f"{rate:.0f} GFLOP/s"] for dtype, rate in limits.gemm_gflop_s.items()]
    rows += [
        [f"the same by torch's own way, {dtype}", f"{rate:.0f} GFLOP/s"] for dtype, rate in limits.plain_gflop_s.items()
    ]
    rows.append(["memory, reading", f"{limits.read_gb_s:.1f} GB/s"])
    notes = [limits.picture_note("float32"), limits.decode_note(MIDDLE, "float32")]
    return Report("limits", [Table("This machine", ("what", "peak"), rows)], notes, asdict(limits))
