"""The states that references leave behind, kept so that a voice which is used again need not be decoded again."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

from torch import Tensor

from vllm_omni.models.qwen3_tts.codec.state import CodecState

MAX_KEPT = 8  # most recently used first


class WarmStates:
    """By a key of all the reference's codes."""

    def __init__(self) -> None:
        self._kept: OrderedDict[bytes, CodecState] = OrderedDict()

    @staticmethod
    def key(reference: Tensor) -> bytes:
        """reference: [n, Q] int64."""
        return hashlib.sha256(reference.cpu().contiguous().numpy().tobytes()).digest()

    def find(self, key: bytes) -> CodecState | None:
        """The state behind that reference, of one row."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def keep(self, key: bytes, state: CodecState) -> None:
        """state: of one row; nobody writes into it."""
        self._kept[key] = state
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
