"""Compiles the attention kernels for GPUs that are not there, down to machine code: `python -m support.triton_compiler
CAPABILITY`, in a process without Triton's interpreter. Prints the shared memory that each takes, as JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_omni.layers.attention import triton_kernels as kernels
from vllm_omni.layers.attention.triton import SPLITS, KernelShape

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
NUMBERS = {"table_stride": "i32", "num_places": "i32", "scale": "fp32"}
FLOATS = ("partial", "peaks", "totals")
STATES = ("query", "output", "key_cache", "value_cache")
SHAPES = [
    (torch.bfloat16, 128, 16, 8),
    (torch.float16, 80, 12, 1),
    (torch.float32, 64, 14, 2),
    (torch.float32, 256, 8, 1),
]


def shared_bytes(kernel: Any, states: str, constants: dict[str, Any], capability: int) -> int:
    names = kernel.arg_names
    types = dict.fromkeys(names, "*i64")
    types |= dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(STATES, states) | NUMBERS
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=aligned)
    return int(compile_kernel(source, target=GPUTarget("cuda", capability, 32)).metadata.shared)


def main() -> None:
    capability, found = int(sys.argv[1]), {}
    for dtype, head_dim, heads, kv_heads in SHAPES:
        for window in (None, 100) if dtype == torch.bfloat16 else (None,):
            query = torch.empty(1, heads, head_dim, dtype=dtype, device="meta")
            pool = torch.empty(2, 1, 16, kv_heads, head_dim, dtype=dtype, device="meta")
            shape = KernelShape(query, pool, window)
            constants = {
                "decode_splits": {**shape.of_keys, **SPLITS, "BLOCK_G": shape.decode_group},
                "combine_splits": {**shape.of_result, **SPLITS},
                "prefill_tiles": {**shape.of_keys, "TILE": shape.tile, "BLOCK_G": shape.group},
            }
            for name, values in constants.items():
                key = f"{name} {dtype} {head_dim} {window}"
                found[key] = shared_bytes(getattr(kernels, name), TYPES[dtype], values, capability)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
