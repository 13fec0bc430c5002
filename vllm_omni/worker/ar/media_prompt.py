"""A prompt with images, audio and video as a language model takes it: tokens, places of the media among them, and what
the encoders read. Knows no file formats and no model.

Legend: T tokens, M placeholder tokens of one item.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

import torch
from torch import Tensor

from vllm_omni.errors import InvalidRequestError

INPUTS = {
    "image": ("pixel_values", "grid_thw"),
    "video": ("pixel_values", "grid_thw", "second_per_grid"),
    "audio": ("features",),
}


@dataclass(frozen=True, slots=True, eq=False)
class MediaItem:
    """One image, audio or video."""

    kind: str
    indices: Tensor  # [M] int64, increasing: the tokens whose embeddings its encoder gives
    # by INPUTS of its kind: pixel_values [patches, patch values], grid_thw [3] int64 (in patches), second_per_grid []
    # float (of one step of t), features [mel bins, frames] without padding
    inputs: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if self.kind not in INPUTS or set(self.inputs) != set(INPUTS[self.kind]):
            raise InvalidRequestError(
                f"media: got the kind {self.kind!r} with {sorted(self.inputs)}, expected one of "
                + "; ".join(f"{kind} with {', '.join(names)}" for kind, names in INPUTS.items())
            )

    def digest(self) -> bytes:
        """sha256 over everything that the encoder and the positions of this item depend on."""
        parts = sha256(self.kind.encode())
        for name in INPUTS[self.kind]:
            tensor = self.inputs[name].detach().cpu().contiguous()
            parts.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            parts.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        return parts.digest()


@dataclass(frozen=True, slots=True, eq=False)
class MediaPrompt:
    """A whole prompt, its media decoded."""

    token_ids: Sequence[int]  # T, media expanded to their placeholder tokens
    content_ids: Sequence[int]  # T, what makes a token the same for the prefix cache; see `content_ids_of`
    positions: Tensor  # [3, T] (time, height, width), int64, or float32 where time is not counted in whole numbers
    position_delta: float  # a token t behind the prompt stands at t + position_delta
    items: Sequence[MediaItem] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        length = len(self.token_ids)
        if len(self.content_ids) != length or self.positions.shape != (3, length):
            raise InvalidRequestError(
                f"media prompt: got {length} token ids, {len(self.content_ids)} content ids and positions "
                f"{list(self.positions.shape)}, expected equal lengths and positions [3, {length}]"
            )
        for item in self.items:
            is_increasing = bool((item.indices.diff() > 0).all())
            if not len(item.indices) or not is_increasing or not 0 <= item.indices[0] <= item.indices[-1] < length:
                raise InvalidRequestError(
                    f"media prompt: got {item.kind} at {len(item.indices)} places, expected one or more, in order, "
                    f"within its {length} tokens"
                )


def content_ids_of(token_ids: Sequence[int], items: Sequence[MediaItem]) -> list[int]:
    """The token ids, with a 248-bit number of the media content and the offset in it at every placeholder."""
    ids = [int(token) for token in token_ids]
    for item in items:
        digest = item.digest()
        for offset, index in enumerate(item.indices.tolist()):
            key = sha256(digest + offset.to_bytes(8, "little")).digest()
            ids[index] = (1 << 255) | int.from_bytes(key[:31], "little")
    return ids
