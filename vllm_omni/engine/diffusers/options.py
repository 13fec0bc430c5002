"""The YAML keys of a `diffusers` stage."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_omni.errors import ConfigError

OUTPUTS = ("image", "audio", "video")


@dataclass(frozen=True, slots=True)
class DiffusersOptions:
    """The YAML keys of a `diffusers` stage."""

    output: str | None = None  # what the pipeline makes: one of OUTPUTS; None: what its class says
    pipeline: str | None = None  # the class of diffusers that runs the folder; None: that of its model_index.json

    def __post_init__(self) -> None:
        if self.output is not None and self.output not in OUTPUTS:
            raise ConfigError(f"output: got {self.output!r}, expected one of {', '.join(map(repr, OUTPUTS))}")
