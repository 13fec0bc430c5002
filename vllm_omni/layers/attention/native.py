"""Paged attention by the package's own CPU kernels, where they are built and take the heads; torch's elsewhere."""

from __future__ import annotations

from torch import Tensor

from vllm_omni.layers.attention.base import AttentionUse
from vllm_omni.layers.attention.sdpa import SDPAAttention
from vllm_omni.layers.native.attention import MAX_HEAD_DIM, attend, fits
from vllm_omni.layers.native.library import kernels
from vllm_omni.utils.device import is_cpu


class NativeAttention(SDPAAttention):
    """Reads the pages in place. A row's result is a function of its own sequence, bit for bit."""

    runs_layers = True
    takes_query_only = False

    @classmethod
    def complaint(cls, use: AttentionUse) -> str | None:
        if not is_cpu(use.device):
            return f"got {use.device.type}, expected a CPU"
        if kernels(use.dtype) is None:
            return f"no kernels for {use.dtype} are built for this processor, expected those that `make setup` compiles"
        if use.head_dim > MAX_HEAD_DIM:
            return f"got heads of {use.head_dim}, expected at most {MAX_HEAD_DIM}"
        return None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, window: int | None) -> Tensor:
        functions = kernels(query.dtype)
        if functions is None or not is_cpu(query.device) or not fits(query.shape[1], key.shape[1], query.shape[2]):
            return super().attend(query, key, value, kv_cache, window)
        return attend(functions, self.metadata, query, kv_cache, window)
