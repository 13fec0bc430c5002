"""What of a stage's `parallel` can be had: by its kind, by its model's counts, and by the devices that are here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import gcd

from vllm_omni.config.schema import MAX_RANKS, ParallelConfig, StageConfig
from vllm_omni.errors import ConfigError
from vllm_omni.utils.device import num_devices_from, resolve_device

AXES = ("tensor", "sequence", "guidance")
DEADLINE_SHARE = 0.75  # of a stage's worker_timeout_s, so that a silent rank is named before its stage is given up


def check_axes(parallel: ParallelConfig, known: Collection[str], who: str) -> None:
    """ConfigError for an axis along which this model or kind of stage cannot be shared."""
    for axis in AXES:
        size = getattr(parallel, axis)
        if size > 1 and axis not in known:
            could = f"expected {', '.join(known)}, or no such key" if known else "which cannot be shared by ranks"
            raise ConfigError(f"parallel.{axis}: got {size}, but {who} has one rank; {could}")


def check_divisible(axis: str, ranks: int, counts: Mapping[str, int]) -> None:
    """ConfigError, with what would work, where ranks do not divide what they share. counts: by name."""
    wrong = {name: count for name, count in counts.items() if count % ranks}
    if ranks > 1 and wrong:
        common = gcd(*counts.values())
        fitting = ", ".join(str(size) for size in range(1, min(common, MAX_RANKS) + 1) if common % size == 0)
        words = ", ".join(f"{count} {name}" for name, count in wrong.items())
        raise ConfigError(
            f"parallel.{axis}: got {ranks}, by which {words} are not divisible; expected one of {fitting}"
        )


def check_devices(stage: StageConfig) -> None:
    """ConfigError where a rank would have no device of its own, or would not hold its share there."""
    if stage.offload == "weights":
        raise ConfigError("parallel: got several ranks, but their shares stay on their devices; remove `offload`")
    device, size = resolve_device(stage.device), stage.parallel.size
    found = num_devices_from(device)
    if found is not None and found < size:
        raise ConfigError(
            f"parallel: got {size} ranks, but from {device} on this machine has {found} CUDA devices, expected one for "
            "each; ask for fewer, or for device: cpu"
        )
