"""Which attention backend a stage takes: the one that its config names, or the first that fits of those that are best
on its device.
"""

from __future__ import annotations

from vllm_omni import registry
from vllm_omni.errors import ConfigError
from vllm_omni.layers.attention.base import AttentionUse, PagedAttention

AUTO = "auto"
BEST: dict[str, tuple[str, ...]] = {"cpu": ("native",), "cuda": ("flash", "triton")}  # by device, the best first
EVERYWHERE = "sdpa"


def choose_attention(name: str, use: AttentionUse) -> str:
    """The row of the registry for a stage's `attention`; ConfigError for one that cannot be used so."""
    if name == AUTO:
        fitting = (row for row in BEST.get(use.device.type, ()) if _backend(row).complaint(use) is None)
        return next(fitting, EVERYWHERE)
    complaint = _backend(name).complaint(use)
    if complaint is not None:
        raise ConfigError(f"attention: {name!r}: {complaint}; or use attention: {AUTO}")
    return name


def _backend(row: str) -> type[PagedAttention]:
    found: type[PagedAttention] = registry.resolve("attention", row)
    return found
