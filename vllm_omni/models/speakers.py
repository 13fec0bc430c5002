"""The voices of a Qwen2.5-Omni checkpoint: its spk_dict.pt, read by torch's loader of plain tensors and checked. Knows
no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_omni.errors import CheckpointError, ConfigError, InvalidRequestError
from vllm_omni.utils.checks import brief, check_number, did_you_mean

FILE = "spk_dict.pt"
PREFERRED = "Chelsie"


@dataclass(frozen=True, slots=True, eq=False)
class Speaker:
    """bos_token: the text token that starts a reply in this voice. cond: [1, C] float32, the speaker's embedding.
    ref_mel: [1, F, mel bins] float32, a sound of the voice.
    """

    bos_token: int
    cond: Tensor
    ref_mel: Tensor


@dataclass(frozen=True, slots=True)
class Speakers:
    """Speaker by name, in the order of the file."""

    by_name: Mapping[str, Speaker]

    @classmethod
    def load(cls, folder: Path) -> Speakers:
        """From a checkpoint folder; ConfigError without the file, CheckpointError for anything else in it."""
        path = folder / FILE
        if not path.is_file():
            raise ConfigError(f"{path}: missing; speech needs the speakers of the checkpoint, copy the file there")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # the reader raises whatever the bytes make it raise
            raise CheckpointError(f"{path}: cannot be read as plain tensors ({error})") from error
        if not isinstance(content, dict) or not content:
            raise CheckpointError(f"{path}: got {type(content).__name__}, expected speakers by name, at least one")
        return cls({name: _speaker(name, entry, path) for name, entry in content.items()})

    @property
    def default(self) -> str:
        return PREFERRED if PREFERRED in self.by_name else next(iter(self.by_name))

    def find(self, name: object) -> Speaker:
        """The speaker that a request asks for, None the default; InvalidRequestError with the list for another."""
        if name is None:
            name = self.default
        if not isinstance(name, str) or name not in self.by_name:
            near = did_you_mean(name, self.by_name) if isinstance(name, str) else ""
            hint = near if "mean" in near else ""
            raise InvalidRequestError(
                f"speaker: got {brief(name)}, expected one of {', '.join(sorted(self.by_name))}{hint}"
            )
        return self.by_name[name]


def _speaker(name: object, entry: Any, path: Path) -> Speaker:
    where = f"{path}: {brief(name)}"
    if not isinstance(name, str) or not isinstance(entry, dict):
        raise CheckpointError(f"{where}: got {type(entry).__name__}, expected a mapping under a name")
    token = entry.get("bos_token")
    if isinstance(token, Tensor) and token.numel() == 1:
        token = token.item()
    complaint = check_number("bos_token", token, 0, integer=True)
    if complaint or token is None:
        raise CheckpointError(f"{where}: {complaint}")
    return Speaker(int(token), _tensor(entry, "cond", 2, where), _tensor(entry, "ref_mel", 3, where))


def _tensor(entry: Mapping[str, Any], key: str, num_dims: int, where: str) -> Tensor:
    tensor = entry.get(key)
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.layout is not torch.strided:
        raise CheckpointError(f"{where}: {key}: got {type(tensor).__name__}, expected a tensor of numbers")
    if tensor.ndim != num_dims or len(tensor) != 1 or not tensor.numel():
        raise CheckpointError(
            f"{where}: {key}: got the shape {list(tensor.shape)}, expected {num_dims} dimensions, the first of size 1"
        )
    if not tensor.isfinite().all():
        raise CheckpointError(f"{where}: {key}: got NaN or infinity, expected finite numbers")
    return tensor.float()
