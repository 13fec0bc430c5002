"""Products of rows with a weight, as linear layers compute them: by the package's kernels, by oneDNN with the weight
packed once, and by torch's own `linear`. What `vllm_omni/layers/packing.py` chooses rests on these figures.

A weight that few rows pass is bound by reading it: there are as many copies of it as no cache holds, multiplied in
turn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.limits import GIGA, SIZES, Limits, fastest
from benchmarks.measure import Options, Report, Table
from benchmarks.sides import SideProcess

WEIGHTS = {"gate and up of Qwen3-0.6B": (6144, 1024), "down of Qwen3-0.6B": (1024, 3072)}  # [outputs, inputs]
ROWS = (1, 8, 32, 128, 512)
FEW_ROWS = 32  # up to here reading counts, and bytes are told
COPIES_BYTES, MOST_COPIES = 2**28, 64
OURS, ONEDNN, TORCH = "vllm_omni", "oneDNN, packed", "torch"
COLUMNS = ("weight", "rows", OURS, ONEDNN, TORCH, "ours / the better of them")


class Probe:
    """Measures this process's machine."""

    def dtypes(self) -> list[str]:
        """Those that the processor multiplies as fast as it can."""
        import torch

        from vllm_omni.utils.device import multiplies_bfloat16

        return ["float32", *(["bfloat16"] if multiplies_bfloat16(torch.device("cpu")) else [])]

    def seconds(self, dtype: str, shape: tuple[int, int], rows: int, seconds: float) -> dict[str, float]:
        """Of one product, by way; ways that are not there are left out."""
        import torch

        x = torch.randn(rows, shape[1]).to(getattr(torch, dtype))
        with torch.inference_mode():
            return {
                name: fastest(lambda each=products: [product(x) for product in each], seconds) / len(products)  # type: ignore[misc]
                for name, products in self._ways(dtype, shape, rows).items()
            }

    def _ways(self, dtype: str, shape: tuple[int, int], rows: int) -> dict[str, list[Callable[[Any], Any]]]:
        import torch
        import torch.nn.functional as F

        from vllm_omni.layers.native.packed import NativePacking
        from vllm_omni.layers.packing import OneDNNPacking, Packing
        from vllm_omni.utils.device import multiplies_with_onednn

        weight = torch.randn(shape).to(getattr(torch, dtype))
        fitting = COPIES_BYTES // (weight.numel() * weight.itemsize)
        count = max(1, min(fitting, MOST_COPIES)) if rows <= FEW_ROWS else 1
        packings: dict[str, Packing | None] = {OURS: NativePacking.find(weight)}
        if multiplies_with_onednn(weight.device, weight.dtype):
            packings[ONEDNN] = OneDNNPacking()
        ways: dict[str, list[Callable[[Any], Any]]] = {}
        for name, packing in packings.items():
            if packing is not None:
                packed = [packing.pack(weight.clone()) for _ in range(count)]
                ways[name] = [lambda x, w=each, p=packing: p.multiply(x, w, None) for each in packed]  # type: ignore[misc]
        copies = [weight.clone() for _ in range(count)]
        ways[TORCH] = [lambda x, w=each: F.linear(x, w) for each in copies]  # type: ignore[misc]
        return ways


def run(options: Options, limits: Limits | None = None) -> Report:
    weights = {"a small one": (64, 64)} if options.is_quick else WEIGHTS
    tables, figures = [], []
    with SideProcess("products", options.threads, Probe) as probe:
        for dtype in probe.call("dtypes")[1]:
            rows = []
            for words, shape in weights.items():
                for count in ROWS[:2] if options.is_quick else ROWS:
                    found = probe.call("seconds", dtype, shape, count, 0.01 if options.is_quick else 0.5)[1]
                    figures.append({"dtype": dtype, "shape": shape, "rows": count, "seconds": found})
                    rows.append([words, str(count), *_cells(found, dtype, shape, count)])
            tables.append(Table(f"Products, {dtype}", COLUMNS, rows))
    notes = [] if limits is None else [f"Reading alone gives {limits.read_gb_s:.1f} GB/s."]
    return Report("products", tables, notes, {"products": figures})


def _cells(found: dict[str, float], dtype: str, shape: tuple[int, int], rows: int) -> list[str]:
    outputs, inputs = shape

    def rate(seconds: float) -> str:
        if rows <= FEW_ROWS:
            return f"{outputs * inputs * SIZES[dtype] / seconds / GIGA:.1f} GB/s"
        return f"{2 * rows * outputs * inputs / seconds / GIGA:.0f} GFLOP/s"

    others = [seconds for name, seconds in found.items() if name != OURS]
    ratio = f"{min(others) / found[OURS]:.2f}" if OURS in found else "-"
    return [*(rate(found[name]) if name in found else "-" for name in (OURS, ONEDNN, TORCH)), ratio]
