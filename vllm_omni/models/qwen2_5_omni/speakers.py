"""The voices of a published Qwen2.5-Omni folder, from `spk_dict.pt`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_omni.errors import CheckpointError, ConfigError, InvalidRequestError
from vllm_omni.utils.checkpoint_files import check_file
from vllm_omni.utils.checks import check_number, did_you_mean

FILE = "spk_dict.pt"
DEFAULT_SPEAKER = "Chelsie"


@dataclass(frozen=True, slots=True, eq=False)
class Speaker:
    """One voice; its tensors are float32, on the CPU."""

    bos_token: int  # the text token that starts the talker's reply
    cond: Tensor  # [E], the speaker vector
    ref_mel: Tensor  # [T, mel bins], a reference recording


class Speakers:
    """By name, in the order of the file."""

    def __init__(self, voices: Mapping[str, Speaker]) -> None:
        self._voices = dict(voices)

    @classmethod
    def load(cls, folder: Path) -> Speakers:
        """ConfigError when the file is missing, CheckpointError when it holds something else than speakers. Tensors
        alone are read from it: nothing is unpickled.
        """
        path = folder / FILE
        if path.exists():
            check_file(path)
        try:
            raw = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise ConfigError(f"{path}: missing; it belongs to the published folder and holds the voices") from None
        except Exception as error:  # torch has no class of its own for a file that it refuses
            raise CheckpointError(f"{path}: damaged, or holds more than tensors and numbers ({error})") from error
        if not isinstance(raw, Mapping) or not raw:
            raise CheckpointError(f"{path}: got {type(raw).__name__}, expected a mapping from names to voices")
        return cls({str(name): _speaker(value, f"{path}: {name}") for name, value in raw.items()})

    @property
    def names(self) -> list[str]:
        return list(self._voices)

    @property
    def default(self) -> str:
        return DEFAULT_SPEAKER if DEFAULT_SPEAKER in self._voices else self.names[0]

    def get(self, name: object) -> Speaker:
        """The voice of that name, the default one for None; InvalidRequestError for an unknown one."""
        return self._voices[self.resolve(name)]

    def resolve(self, name: object) -> str:
        """The name itself, the default one for None; InvalidRequestError for an unknown one."""
        if name is None:
            return self.default
        if not isinstance(name, str) or name not in self._voices:
            raise InvalidRequestError(f"speaker: got {name!r:.80}{did_you_mean(str(name)[:80], self.names)}")
        return name


def _speaker(raw: object, where: str) -> Speaker:
    if not isinstance(raw, Mapping):
        raise CheckpointError(f"{where}: got {type(raw).__name__}, expected bos_token, cond and ref_mel")
    check_number(f"{where}: bos_token", raw.get("bos_token"), 0, integer=True, raises=CheckpointError)
    cond = _tensor(raw, "cond", 2, where)
    ref_mel = _tensor(raw, "ref_mel", 3, where)
    return Speaker(int(raw["bos_token"]), cond[0], ref_mel[0])


def _tensor(raw: Mapping[str, Any], key: str, num_dims: int, where: str) -> Tensor:
    """A finite, dense float tensor [1, ...] as float32."""
    value, expected = raw.get(key), f"floats [1{', n' * (num_dims - 1)}]"
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{where}: {key}: got {type(value).__name__}, expected {expected}")
    is_dense = value.layout == torch.strided and value.is_floating_point()
    if not is_dense or value.ndim != num_dims or value.shape[0] != 1 or value.numel() == 0:
        raise CheckpointError(f"{where}: {key}: got {value.dtype} {list(value.shape)}, expected {expected}")
    if not bool(torch.isfinite(value).all()):
        raise CheckpointError(f"{where}: {key}: got values that are not finite")
    return value.detach().float().contiguous()
