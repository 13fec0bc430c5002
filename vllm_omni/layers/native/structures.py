"""What the kernels read, as C lays it out; the fields are those of the structs in csrc/cpu."""

from __future__ import annotations

import ctypes

POINTER, COUNT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class LinearStruct(ctypes.Structure):
    _fields_ = (
        *(("weight", POINTER), ("scales", POINTER), ("bias", POINTER)),
        *(("outputs", COUNT), ("inputs", COUNT)),
    )


class HeadsStruct(ctypes.Structure):
    _fields_ = (("queries", COUNT), ("keys", COUNT), ("size", COUNT), ("window", COUNT), ("scale", FLOAT))


class StepStruct(ctypes.Structure):
    _fields_ = (
        *(("slots", POINTER), ("query_starts", POINTER), ("context_lens", POINTER), ("block_table", POINTER)),
        *(("rows", COUNT), ("sequences", COUNT), ("table_stride", COUNT), ("block_size", COUNT)),
    )


class CacheStruct(ctypes.Structure):
    _fields_ = (("keys", POINTER), ("values", POINTER))


class LayerStruct(ctypes.Structure):
    _fields_ = (
        *((f"{name}_norm", POINTER) for name in ("attention", "query", "key", "mlp")),
        *((name, LinearStruct) for name in ("qkv", "output", "gate_up", "down")),
        ("window", COUNT),
    )


class ShapeStruct(ctypes.Structure):
    _fields_ = (("hidden", COUNT), ("intermediate", COUNT), ("heads", HeadsStruct), ("norm_epsilon", FLOAT))
