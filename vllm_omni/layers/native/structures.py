"""What the kernels read, as C lays it out; the fields are those of the structs in csrc/cpu."""

from __future__ import annotations

import ctypes

POINTER, COUNT, FLOAT, FLAG = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int32


class LinearStruct(ctypes.Structure):
    _fields_ = (
        *(("weight", POINTER), ("scales", POINTER), ("bias", POINTER)),
        *(("outputs", COUNT), ("inputs", COUNT), ("is_in_halves", FLAG), ("has_gelu", FLAG)),
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


class WantedStruct(ctypes.Structure):
    _fields_ = (("rows", POINTER), ("count", COUNT))


class ExpertStruct(ctypes.Structure):
    _fields_ = (("gate_up", LinearStruct), ("down", LinearStruct))


class MixtureShapeStruct(ctypes.Structure):
    _fields_ = tuple((name, COUNT) for name in ("rows", "experts", "chosen", "hidden", "intermediate"))


class TokensStruct(ctypes.Structure):
    _fields_ = (("samples", COUNT), ("length", COUNT), ("size", COUNT))


class PerSampleStruct(ctypes.Structure):
    _fields_ = (("data", POINTER), ("stride", COUNT))


class NormStruct(ctypes.Structure):
    _fields_ = (("weight", POINTER), ("epsilon", FLOAT), ("centred", FLAG))


class HeadRowStruct(ctypes.Structure):
    _fields_ = (
        *((name, COUNT) for name in ("queries", "keys", "others", "size", "turned")),
        *(("query_norm", POINTER), ("key_norm", POINTER), ("epsilon", FLOAT), ("neighbours", FLAG)),
    )


class BandStruct(ctypes.Structure):
    _fields_ = tuple((name, COUNT) for name in ("block", "offset", "back", "ahead"))


class DiffusionBlockStruct(ctypes.Structure):
    _fields_ = (
        *((f"{name}_norm", NormStruct) for name in ("attention", "attended", "mlp", "computed")),
        ("heads", HeadRowStruct),
        *((name, LinearStruct) for name in ("qkv", "output", "up", "down")),
        ("band", BandStruct),
    )


class TokenSpanStruct(ctypes.Structure):
    _fields_ = (
        *(("sample", COUNT), ("token", COUNT), ("tokens", TokensStruct), ("turns", POINTER)),
        ("offset", COUNT),
    )


class ModulationsStruct(ctypes.Structure):
    _fields_ = (("data", POINTER), ("samples", COUNT), ("count", COUNT))


class OperandStruct(ctypes.Structure):
    _fields_ = (("data", POINTER), ("sample", COUNT), ("token", COUNT), ("head", COUNT))


class FullShapeStruct(ctypes.Structure):
    _fields_ = (
        *((name, COUNT) for name in ("samples", "queries", "keys", "query_heads", "key_heads", "size")),
        *(("band", BandStruct), ("scale", FLOAT)),
    )


class PicturesStruct(ctypes.Structure):
    _fields_ = tuple((name, COUNT) for name in ("count", "height", "width", "inputs", "outputs", "frames"))


class FilterStruct(ctypes.Structure):
    _fields_ = tuple((name, POINTER) for name in ("weight", "bias", "residual"))


class GroupNormStruct(ctypes.Structure):
    _fields_ = (
        *((name, COUNT) for name in ("pictures", "pixels", "channels", "groups")),
        *(("epsilon", FLOAT), ("activated", FLAG)),
    )
