"""What the kernels read, as C lays it out, and what they are called with: the fields are those of the structs in
csrc/cpu, the arguments those of the functions that kernels.cpp exports. Read by setup.py as well, without torch.
"""

from __future__ import annotations

import ctypes
import hashlib

POINTER, COUNT, FLOAT, FLAG = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int32
THREADS = ctypes.c_int


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


LAYOUT_ARGUMENTS: dict[str, tuple[type, ...]] = {
    "pack": (POINTER, COUNT, COUNT, THREADS),
    "unpack_rows": (POINTER, COUNT, POINTER, COUNT, POINTER, THREADS),
}
ARGUMENTS: dict[str, tuple[type, ...]] = {
    "multiply": (POINTER, COUNT, ctypes.POINTER(LinearStruct), ctypes.c_bool, POINTER, THREADS),
    "attend": (
        ctypes.POINTER(StepStruct),
        ctypes.POINTER(HeadsStruct),
        POINTER,
        ctypes.POINTER(CacheStruct),
        POINTER,
        THREADS,
    ),
    "find_largest": (POINTER, COUNT, COUNT, POINTER, THREADS),
    "find_top": (POINTER, COUNT, COUNT, COUNT, POINTER, POINTER, THREADS),
    "run_layers": (
        *(POINTER, COUNT, ctypes.POINTER(ShapeStruct), ctypes.POINTER(StepStruct)),
        *(POINTER, POINTER, POINTER, ctypes.POINTER(WantedStruct), POINTER, THREADS),
    ),
    "mix_experts": (POINTER, ctypes.POINTER(MixtureShapeStruct), POINTER, POINTER, POINTER, POINTER, THREADS),
    "modulate": (
        *(POINTER, ctypes.POINTER(TokensStruct), ctypes.POINTER(NormStruct)),
        *(ctypes.POINTER(PerSampleStruct), ctypes.POINTER(PerSampleStruct), POINTER, THREADS),
    ),
    "add_gated": (
        *(POINTER, POINTER, ctypes.POINTER(TokensStruct), ctypes.POINTER(NormStruct)),
        *(ctypes.POINTER(PerSampleStruct), POINTER, THREADS),
    ),
    "place": (POINTER, ctypes.POINTER(TokensStruct), ctypes.POINTER(HeadRowStruct), POINTER, THREADS),
    "gate": (POINTER, COUNT, COUNT, POINTER, THREADS),
    "gelu": (POINTER, COUNT, POINTER, THREADS),
    "run_blocks": (POINTER, COUNT, POINTER, COUNT, ctypes.POINTER(ModulationsStruct), POINTER, THREADS),
    "snake": (POINTER, POINTER, POINTER, COUNT, COUNT, COUNT, POINTER, THREADS),
    "filtered_snake": (POINTER, POINTER, POINTER, POINTER, COUNT, COUNT, COUNT, POINTER, THREADS),
    "group_norm": (POINTER, ctypes.POINTER(GroupNormStruct), POINTER, POINTER, POINTER, THREADS),
    "norm_pixels": (POINTER, POINTER, COUNT, COUNT, ctypes.c_float, ctypes.c_bool, POINTER, THREADS),
    "convolve": (
        *(POINTER, ctypes.POINTER(PicturesStruct), ctypes.POINTER(FilterStruct)),
        *(ctypes.c_int32, POINTER, THREADS),
    ),
    "attend_fully": (ctypes.POINTER(FullShapeStruct), *[ctypes.POINTER(OperandStruct)] * 3, POINTER, THREADS),
}


def interface() -> int:
    """A number that all these fields and arguments give: kernels that were compiled for others are not called."""
    structs = sorted((kind.__name__, _names(kind)) for kind in ctypes.Structure.__subclasses__() if _is_here(kind))
    functions = [
        (name, [argument.__name__ for argument in arguments])
        for name, arguments in {**LAYOUT_ARGUMENTS, **ARGUMENTS}.items()
    ]
    digest = hashlib.sha256(repr((structs, functions)).encode()).digest()
    return int.from_bytes(digest[:8], "big")


def _names(kind: type[ctypes.Structure]) -> list[tuple[str, str]]:
    return [(field[0], field[1].__name__) for field in kind._fields_]


def _is_here(kind: type[ctypes.Structure]) -> bool:
    return kind.__module__ == __name__
