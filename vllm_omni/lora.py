"""LoRA adapters (arXiv 2106.09685) as a request names them. Knows no file and no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from vllm_omni.errors import InvalidRequestError
from vllm_omni.utils.checks import brief, did_you_mean
from vllm_omni.utils.plain import as_dict, as_list, as_number

MAX_LORAS = 8  # of one request in one stage
MAX_SCALE = 10.0
MAX_NAME = 255
MAX_PATH = 4096
KEYS = ("name", "path", "scale")
LABELS = ("int_id",)  # a number by which other servers tell adapters apart; here their files do
EXPECTED = "a list of {name, scale}"


@dataclass(frozen=True, slots=True)
class LoRA:
    """One adapter and how strongly it acts."""

    name: str | None = None  # a file of the stage's `lora.folders`, without its suffix; beside a path a mere label
    path: str | None = None  # or the file itself, which must lie in one of them
    scale: float = 1.0  # 0: not at all

    def __post_init__(self) -> None:
        for field, most in (("name", MAX_NAME), ("path", MAX_PATH)):
            value = getattr(self, field)
            if value is not None and not (isinstance(value, str) and 0 < len(value) <= most):
                raise InvalidRequestError(f"lora.{field}: got {brief(value)}, expected 1 to {most} characters")
        if self.name is None and self.path is None:
            raise InvalidRequestError("lora: got neither name nor path, expected the name of an adapter")
        scale = as_number("lora.scale", self.scale, -MAX_SCALE, MAX_SCALE, raises=InvalidRequestError)
        object.__setattr__(self, "scale", float(scale))

    @property
    def label(self) -> str:
        """What files say of it: nobody's folders."""
        return f"{self.name if self.path is None else PurePath(self.path).stem}:{self.scale:g}"


def checked_loras(value: object) -> tuple[LoRA, ...]:
    """One adapter or a list of them, each a LoRA or a mapping of its fields; InvalidRequestError for anything else."""
    if isinstance(value, LoRA | Mapping):
        value = [value]
    given = as_list("lora", value, MAX_LORAS, raises=InvalidRequestError, expected=EXPECTED)
    found = tuple(item if isinstance(item, LoRA) else _from_mapping(item) for item in given)
    said = [(lora.name, lora.path) for lora in found]
    for each in said:
        if said.count(each) > 1:
            raise InvalidRequestError(f"lora: got {brief(each[1] or each[0])} twice; give it once, with one scale")
    return found


def _from_mapping(item: Any) -> LoRA:
    given = as_dict("lora", item, len(KEYS) + len(LABELS), raises=InvalidRequestError, expected=EXPECTED)
    for key in given:
        if key not in (*KEYS, *LABELS):
            raise InvalidRequestError(f"lora: got the key {brief(key)}{did_you_mean(str(key)[:80], KEYS)}")
    return LoRA(**{key: value for key, value in given.items() if key in KEYS and value is not None})
