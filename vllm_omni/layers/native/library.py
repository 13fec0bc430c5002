"""The compiled kernels that fit this processor, or none. Knows what they are called with, not what for."""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path

import torch
from torch import Tensor

from vllm_omni.layers.native.structures import ARGUMENTS, LAYOUT_ARGUMENTS, LinearStruct, interface
from vllm_omni.utils.device import instruction_sets, is_cpu

logger = logging.getLogger(__name__)

VARIANTS = ("amx", "avx512bf16", "avx2")  # best first
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
HELD = {**DTYPES, torch.int8: "int8"}  # what weights may be held in
SHARED_WORK = 2**20  # multiplications: some ten microseconds of one thread


class Layout:
    """How weights of one element type are packed, and read by row."""

    def __init__(self, library: ctypes.CDLL, dtype: str) -> None:
        for name, arguments in LAYOUT_ARGUMENTS.items():
            function = getattr(library, f"{name}_{dtype}")
            function.argtypes, function.restype = arguments, None
        self.pack = getattr(library, f"pack_{dtype}")
        self.unpack_rows = getattr(library, f"unpack_rows_{dtype}")


class Kernels:
    """The functions of one element type of activations."""

    def __init__(self, library: ctypes.CDLL, dtype: str) -> None:
        for name, arguments in ARGUMENTS.items():
            function = getattr(library, f"{name}_{dtype}")
            function.argtypes, function.restype = arguments, None
        self.layouts = {held: Layout(library, name) for held, name in HELD.items()}
        self.multiply = getattr(library, f"multiply_{dtype}")
        self.attend = getattr(library, f"attend_{dtype}")
        self.find_largest = getattr(library, f"find_largest_{dtype}")
        self.find_top = getattr(library, f"find_top_{dtype}")
        self.run_layers = getattr(library, f"run_layers_{dtype}")
        self.mix_experts = getattr(library, f"mix_experts_{dtype}")
        self.modulate = getattr(library, f"modulate_{dtype}")
        self.add_gated = getattr(library, f"add_gated_{dtype}")
        self.place = getattr(library, f"place_{dtype}")
        self.gate = getattr(library, f"gate_{dtype}")
        self.gelu = getattr(library, f"gelu_{dtype}")
        self.run_blocks = getattr(library, f"run_blocks_{dtype}")
        self.snake = getattr(library, f"snake_{dtype}")
        self.filtered_snake = getattr(library, f"filtered_snake_{dtype}")
        self.group_norm = getattr(library, f"group_norm_{dtype}")
        self.norm_pixels = getattr(library, f"norm_pixels_{dtype}")
        self.convolve = getattr(library, f"convolve_{dtype}")
        self.attend_fully = getattr(library, f"attend_fully_{dtype}")


def kernels(dtype: torch.dtype) -> Kernels | None:
    """Those of an element type; None where there are none, or none were compiled, or the processor is another."""
    file = next(iter(built_variants().values()), None)
    return None if file is None else load(file).get(dtype)


def kernels_for(x: Tensor, *others: Tensor | None) -> Kernels | None:
    """Those of x's type; None also where x is not on a CPU, and where torch traces or differentiates: it does not see
    what they compute, and has no numbers to give them while it traces.
    """
    if torch.compiler.is_compiling() or not is_cpu(x.device):
        return None
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (x, *others)):
        return None
    return kernels(x.dtype)


@functools.cache
def built_variants() -> dict[str, Path]:
    """Those of VARIANTS that are compiled and that this processor runs, as a product shows -> their files; the first is
    used.
    """
    folder, known = Path(__file__).parent, instruction_sets()
    files = {name: sorted(folder.glob(f"_{name}.*so")) for name in VARIANTS if name in known}
    return {name: found[0] for name, found in files.items() if found and multiplies(found[0])}


@functools.cache
def load(file: Path) -> dict[torch.dtype, Kernels]:
    """The functions of one variant, by element type; none where the system does not let them run."""
    try:
        library = ctypes.CDLL(str(file))
    except OSError:  # made for another system, or its OpenMP is not here
        return {}
    if compiled_interface(library) != interface():
        logger.warning("%s was compiled for another version of this package and is not used; run `make setup`", file)
        return {}
    library.prepare.restype = ctypes.c_bool
    return {dtype: Kernels(library, name) for dtype, name in DTYPES.items()} if library.prepare() else {}


def compiled_interface(library: ctypes.CDLL) -> int | None:
    """See `structures.interface`; None of what is too old to say it, or something else."""
    try:
        function = library.compiled_interface
    except AttributeError:
        return None
    function.restype = ctypes.c_uint64
    found: int = function()
    return found


def multiplies(file: Path) -> bool:
    """Whether a variant gets products of whole numbers right, which no rounding touches."""
    return load(file) != {} and all(_multiplies(functions, dtype) for dtype, functions in load(file).items())


def _multiplies(functions: Kernels, dtype: torch.dtype) -> bool:
    x = (torch.arange(40 * 64) % 5 - 2).view(40, 64).to(dtype)
    weight = (torch.arange(64 * 64) % 7 - 3).view(64, 64).to(dtype)
    expected = x @ weight.T
    out = torch.zeros_like(expected)  # memory that was used before may hold the very product
    functions.layouts[dtype].pack(pointer(weight), 64, 64, 1)
    linear = LinearStruct(pointer(weight), None, None, 64, 64, False, False)
    functions.multiply(pointer(x), 40, linear, False, pointer(out), 1)
    return torch.equal(out, expected)


def threads_for(work: int) -> int:
    """How many threads share so many multiplications: what is done sooner than threads meet is one's own."""
    return torch.get_num_threads() if work >= SHARED_WORK else 1


def pointer(tensor: Tensor | None) -> int | None:
    """The address of a contiguous tensor on the CPU."""
    if tensor is None:
        return None
    assert tensor.is_contiguous() and is_cpu(tensor.device)
    return tensor.data_ptr()
