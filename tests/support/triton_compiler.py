"""Compiles the kernels for GPUs that are not there, down to machine code: `python -m support.triton_compiler
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
from vllm_omni.layers.triton import kernels as glue

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
NUMBERS = {"table_stride": "i32", "query_stride": "i32", "num_places": "i32", "scale": "fp32"}
FLOAT8_CAPABILITY = 89
GIVEN = ("HAS_UPDATE", "HAS_SCALE", "HAS_SHIFT", "HAS_NORM", "HAS_GATE")
FLOATS = ("partial", "peaks", "totals")
STATES = ("query", "output", "key_cache", "value_cache")
SHAPES = [
    (torch.bfloat16, 128, 16, 8),
    (torch.float16, 80, 12, 1),
    (torch.float32, 64, 14, 2),
    (torch.float32, 256, 8, 1),
]

# Of the kernels between the products: what they are compiled for. Their numbers by name, all else points to states.
COUNTS = ("rows_per_sample", "num_places", "num_pixels", "width")
GLUE: dict[str, dict[str, Any]] = {
    "norm_rows": {"WIDTH": 3840, "BLOCK": 4096, "IS_CENTRED": False, **dict.fromkeys(GIVEN[:3], True)},
    "gate_rows": {"WIDTH": 3840, "BLOCK": 4096, "IS_CENTRED": True, **dict.fromkeys(GIVEN[3:], True)},
    "swiglu_rows": {"BLOCK": 1024},
    "place_heads": {
        **{"NUM_HEADS": 16, "NUM_KV_HEADS": 8, "HALF": 64, "BLOCK_H": 8, "BLOCK_D": 64, "HAS_NORMS": True},
        **{"ARE_NEIGHBOURS": True, "ROUNDS_PRODUCTS": False},
    },
    "store_rows": {"WIDTH": 1024, "BLOCK": 1024},
    "group_moments": {"WIDTH": 512, "GROUPS": 32, "PIXELS": 16},
    "scale_channels": {"WIDTH": 128, "PIXELS": 64},
    "quantize_rows": {"WIDTH": 10240, "BLOCK": 16384},
}


def shared_bytes(kernel: Any, states: str, constants: dict[str, Any], capability: int) -> int:
    names = kernel.arg_names
    types = dict.fromkeys(names, "*i64")
    types |= dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(STATES, states) | NUMBERS
    return _compiled(kernel, types, constants, capability)


def glue_bytes(name: str, states: str, capability: int) -> int:
    kernel = getattr(glue, name)
    types = {"slots": "*i64", "cos": "*fp32", "sin": "*fp32"}
    if name in ("group_moments", "scale_channels"):
        types |= dict.fromkeys(("means", "squares", "scale", "shift"), "*fp32")
    if name == "quantize_rows":
        types |= {"out": "*fp8e4nv", "scales": "*fp32", "largest_number": "fp32", "most": "fp32"}
    for argument in kernel.arg_names:
        kind = "i32" if argument.endswith("stride") or argument in COUNTS else states
        types.setdefault(argument, "fp32" if argument.endswith("epsilon") else kind)
    return _compiled(kernel, types, GLUE[name], capability)


def _compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int) -> int:
    names = kernel.arg_names
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
    for dtype, states in TYPES.items():
        names = [name for name in GLUE if name != "quantize_rows" or capability >= FLOAT8_CAPABILITY]
        found |= {f"{name} {dtype}": glue_bytes(name, states, capability) for name in names}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
