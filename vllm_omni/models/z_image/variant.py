"""Which Z-Image a folder holds: Turbo, whose guidance is distilled into few steps, or the base model. Both are the same
pipeline class; what tells them apart are the names that a folder carries and the shift of its published sampler.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_omni.models.z_image.trajectory import DEFAULT_GUIDANCE, DEFAULT_STEPS
from vllm_omni.utils.files import read_json

TURBO_SHIFT = 3.0  # base: 6
TURBO_DEFAULTS = {"num_inference_steps": 9, "guidance_scale": 0.0}
BASE_DEFAULTS = {"num_inference_steps": DEFAULT_STEPS, "guidance_scale": DEFAULT_GUIDANCE}
HUB_FOLDER = re.compile(r"models--[^/]+--(.+)")  # a repository in the cache of huggingface_hub


@dataclass(frozen=True, slots=True)
class Variant:
    """Turbo or base, and why."""

    is_turbo: bool
    reason: str

    @classmethod
    def of(cls, folder: Path, sampler_config: Mapping[str, Any]) -> Variant:
        """A name that says "turbo" or "base" decides, else the sampler's shift."""
        for name in _names(folder):
            words = re.split(r"[^a-z]+", name.lower())
            if "turbo" in words or "base" in words:
                return cls("turbo" in words, f"by the name {name!r:.80}")
        shift = sampler_config.get("shift")
        return cls(shift == TURBO_SHIFT, f"by its sampler's shift, {shift}")

    @property
    def defaults(self) -> Mapping[str, Any]:
        return TURBO_DEFAULTS if self.is_turbo else BASE_DEFAULTS

    def words(self) -> str:
        """'Z-Image-Turbo (by its sampler's shift, 3.0)'"""
        return f"{'Z-Image-Turbo' if self.is_turbo else 'Z-Image base'} ({self.reason})"


def _names(folder: Path) -> Iterator[str]:
    """The hub repository that the folder came from, what its files say of it, its own name."""
    whole = folder.resolve()
    for part in whole.parts:
        hub = HUB_FOLDER.fullmatch(part)
        if hub is not None:
            yield hub.group(1)
    for file in ("model_index.json", "transformer/config.json"):
        content = read_json(folder / file) if (folder / file).is_file() else {}
        said = content.get("_name_or_path")
        if isinstance(said, str):
            yield said.rstrip("/").rpartition("/")[2]
    yield whole.name
