"""Devices and dtypes: the only file that names torch.cuda or torch.mps."""

from __future__ import annotations

import mmap
import os
import platform
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vllm_omni.errors import ConfigError

# In what torch says of a CPU, an accelerator and the libraries that compute there, in lower case.
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "alloc_failed")
# As torch calls what lets a CPU multiply bfloat16: of x86 the first two, of ARM the last.
BFLOAT16_FEATURES = ("amx_bf16", "avx512_bf16", "bf16")
# Of x86: without all of one of these oneDNN refuses bfloat16.
ONEDNN_BFLOAT16_FEATURES = ({"avx_ne_convert"}, {"avx512_bw", "avx512_vl", "avx512_dq"})


def resolve_device(name: str = "auto") -> torch.device:
    """'auto' picks CUDA, then MPS, then the CPU; anything else must be a device that is here."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: got {name!r}, expected auto, cpu, cuda, cuda:N or mps") from error
    available = {
        "cpu": True,
        "meta": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(device.type, False):
        raise ConfigError(f"device: got {name!r}, which this machine does not have; use 'auto' or 'cpu'")
    return device


def set_threads(count: int) -> None:
    """How many threads torch computes with on the CPU: of this process, from now on and in threads to come."""
    torch.set_num_threads(count)


def current_threads() -> int:
    """That torch computes with on the CPU, in this process."""
    return torch.get_num_threads()


def device_given(is_accelerator: bool) -> torch.device:
    """Of a process that sees no GPUs but those that it was given: the first of them, or the CPU."""
    return torch.device("cuda" if is_accelerator else "cpu")


def rank_device(first: torch.device, rank: int) -> torch.device:
    """Where a rank computes whose first one computes on `first`: the next CUDA devices, else the same."""
    return torch.device("cuda", (first.index or 0) + rank) if is_cuda(first) else first


def num_devices_from(first: torch.device) -> int | None:
    """How many CUDA devices there are from this one on; None for devices that ranks can share."""
    return torch.cuda.device_count() - (first.index or 0) if is_cuda(first) else None


def is_cpu(device: torch.device) -> bool:
    """Whether a processor with its caches computes, no accelerator."""
    return device.type == "cpu"


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is the faster one at products there. Of a CPU only where its features are known, and torch has
    the library that uses them.
    """
    if not is_cpu(device):
        return True
    return torch.backends.mkldnn.is_available() and not _cpu_features().isdisjoint(BFLOAT16_FEATURES)


def instruction_sets() -> frozenset[str]:
    """Which of those that the package's own kernels are compiled for this CPU has: "avx2", "avx512bf16", "amx"."""
    wide = {"avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "avx512_bf16", "avx512_vnni"}
    needed = {"avx2": {"avx2", "fma3"}, "avx512bf16": wide, "amx": {*wide, "amx_tile", "amx_bf16", "amx_int8"}}
    return frozenset(name for name, features in needed.items() if features <= _cpu_features())


def multiplies_in_tiles(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a CPU has units that multiply whole tiles of this dtype (AMX)."""
    return is_cpu(device) and dtype == torch.bfloat16 and "amx_bf16" in _cpu_features()


def _cpu_features() -> frozenset[str]:
    """As torch calls them; none where it is too old to tell."""
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return frozenset(name for name, value in known.items() if value is True)


def is_cuda(device: torch.device) -> bool:
    """Whether kernels for CUDA run there."""
    return device.type == "cuda"


def is_same_device(one: torch.device, other: torch.device) -> bool:
    """A device without a number is the first of its kind."""
    return (one.type, one.index or 0) == (other.type, other.index or 0)


def compute_capability(device: torch.device) -> tuple[int, int]:
    """Of a CUDA device."""
    major, minor = torch.cuda.get_device_capability(device)
    return int(major), int(minor)


def host_buffer(*shape: int, device: torch.device) -> Tensor:
    """Zeros [*shape] int64 in the host's memory, from where `device` can copy without waiting."""
    return torch.zeros(*shape, dtype=torch.int64, pin_memory=is_cuda(device))


def to_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host as a tensor there; waits for nothing that is computed there."""
    return torch.tensor(values, dtype=dtype, pin_memory=is_cuda(device)).to(device, non_blocking=True)


def numbers_at_once(device: torch.device) -> int:
    """How many of float32 to compute with between two looks at memory: on a CPU what its caches hold, elsewhere what
    there is always room for.
    """
    return 2**18 if is_cpu(device) else 2**26


class CopyFence:
    """Between copies to a device that were begun without waiting, and the next writes to where they come from."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if is_cuda(device) else None

    def record(self) -> None:
        """The copies have been begun."""
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Until what was recorded last has been copied."""
        if self._event is not None:
            self._event.synchronize()


class Readout:
    """Numbers on their way to the host, while the device goes on and overwrites where they stood."""

    def __init__(self, values: Tensor) -> None:
        self._event = torch.cuda.Event() if is_cuda(values.device) else None
        self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=self._event is not None)
        self._values.copy_(values, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def tolist(self) -> list[int]:
        """The numbers, as soon as they are here."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()


class Copies(Protocol):
    """Copies from the host's memory to a device, which run beside what it computes, in their order."""

    def host_memory(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes], not filled, from where copies need not be waited for."""

    def mark(self) -> object:
        """All that has been computed until now, by whoever asks."""

    def begin(self, target: Tensor, source: Tensor, after: object) -> object:
        """Copies once `after`, a mark, is done -> what `wait` takes."""

    def wait(self, arrival: object) -> None:
        """What is computed from now on waits for a copy; the host does not."""


class CudaCopies:
    """On a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def host_memory(self, num_bytes: int) -> Tensor:
        """Exactly so much: what torch itself pins comes in powers of two. Pages of its own, since pages are pinned."""
        pages = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory = torch.frombuffer(pages, dtype=torch.uint8)[:num_bytes]
        address = memory.data_ptr()
        with torch.cuda.device(self._device):
            runtime = torch.cuda.cudart()
            torch.cuda.check_error(runtime.cudaHostRegister(address, len(pages), 0))
        weakref.finalize(memory, runtime.cudaHostUnregister, address).atexit = False
        return memory

    def mark(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self._device).record_event()

    def begin(self, target: Tensor, source: Tensor, after: object) -> torch.cuda.Event:
        assert isinstance(after, torch.cuda.Event)
        self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def wait(self, arrival: object) -> None:
        assert isinstance(arrival, torch.cuda.Event)
        torch.cuda.current_stream(self._device).wait_event(arrival)


class StepGraphs(Protocol):
    """Makes work on fixed tensors repeatable at the cost of one launch."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """What repeats `work`, which reads and writes the same memory each time and asks the device for no number."""


class CudaGraphs:
    """CUDA graphs, which share the memory of what they compute in between: one is replayed at a time, and what is to
    outlive that stands in tensors that were there before.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # One for all captures: what a graph frees serves only graphs of the same stream, and each stream has a
        # workspace of its own for products.
        self._beside = torch.cuda.Stream(device)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Runs `work` once before: kernels are compiled and libraries take their workspaces at their first use."""
        with torch.cuda.device(self._device):
            current, beside = torch.cuda.current_stream(), self._beside
            beside.wait_stream(current)
            with torch.cuda.stream(beside):
                work()
            current.wait_stream(beside)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            # other threads, of other stages, may go on meanwhile
            with torch.cuda.graph(graph, pool=self._pool, stream=beside, capture_error_mode="thread_local"):
                work()
        return graph.replay


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Within it kernels that are launched by no operation of torch run on this device."""
    return torch.cuda.device(device) if is_cuda(device) else nullcontext()


def device_name(device: torch.device) -> str:
    """Of a CUDA device, by which every process calls it, whatever numbers it sees."""
    return str(torch.cuda.get_device_properties(device).uuid)


def raw_stream(device: torch.device) -> int:
    """What is launched on it comes behind what torch has launched on this CUDA device."""
    return int(torch.cuda.current_stream(device).cuda_stream)


def wait_for(device: torch.device) -> None:
    """Until a CUDA device has done what this thread has launched there."""
    torch.cuda.current_stream(device).synchronize()


def multiplies_with_onednn(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN takes weights of this dtype there, and is the faster one at products with them."""
    if not (is_cpu(device) and platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()):
        return False
    if dtype == torch.bfloat16:
        return any(features <= _cpu_features() for features in ONEDNN_BFLOAT16_FEATURES)
    return dtype == torch.float32


def free_memory_bytes(device: torch.device) -> int:
    """Of an accelerator with its own memory, else of the machine, or of the container that this runs in."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([_available_bytes(), *_container_bytes()])


def _available_bytes() -> int:
    """What programs may take without swapping, as Linux says it; elsewhere all memory."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _container_bytes() -> list[int]:
    """What the limit of a control group (version 2) leaves; nothing where there is none."""
    group = Path("/sys/fs/cgroup")
    try:
        most = int((group / "memory.max").read_text())
        fields = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return [max(most - int((group / "memory.current").read_text()) + int(fields["inactive_file"]), 0)]
    except (OSError, KeyError, ValueError):  # "max" is no number
        return []


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, says that memory could not be had."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(error, RuntimeError) and any(words in str(error).lower() for words in OUT_OF_MEMORY):
            return True
        error = error.__cause__
    return False


def release_memory() -> None:
    """Gives back what the allocators of accelerators keep, though nobody uses it."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def total_memory_bytes(device: torch.device) -> int | None:
    """All memory of an accelerator, None where the operating system decides."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return None
