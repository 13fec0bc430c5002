"""Which kernels loaded modules compute with, in words for those who run them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from vllm_omni.layers.decoder import Decoder
from vllm_omni.layers.linear import Embedding, Linear
from vllm_omni.layers.native.library import built_variants

UNPACKED = "torch"


def kernels_of(modules: Iterable[nn.Module]) -> dict[str, str]:
    """products: how linear layers are multiplied (`native`, `onednn`; `torch` where they are not packed). kernels: the
    compiled variant that this processor runs, or none.
    """
    parts = [part for module in modules for part in module.modules()]
    linears = [part for part in parts if isinstance(part, Linear) or (isinstance(part, Embedding) and part.is_head)]
    names = {UNPACKED if part.packing is None else _name(part.packing) for part in linears}
    return {"products": ", ".join(sorted(names)) or UNPACKED, "kernels": next(iter(built_variants()), "none")}


def runs_layers_natively(module: nn.Module) -> bool:
    """Whether the layers of its decoders are run by one call of the kernels."""
    decoders = [part for part in module.modules() if isinstance(part, Decoder)]
    return bool(decoders) and all(decoder.native() is not None for decoder in decoders)


def _name(packing: object) -> str:
    """Of the class of a packing: NativePacking is native."""
    return type(packing).__name__.removesuffix("Packing").lower()
