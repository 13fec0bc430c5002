"""The YAML keys of a `speech_codec` stage."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_omni.errors import ConfigError
from vllm_omni.utils.checks import check_number

MAX_REQUESTS, MAX_FRAMES = 4096, 8192


@dataclass(frozen=True, slots=True)
class CodecOptions:
    """A request beyond the batch waits until another is done, for the state that it needs all the way."""

    part: str | None = None  # which model of a folder that holds several; None for a folder of its own
    max_batch_size: int = 32  # requests that are on their way
    max_batch_frames: int = 32  # frames of one batch, all requests together; also the most that one gets in a step

    def __post_init__(self) -> None:
        if self.part is not None and not isinstance(self.part, str):
            raise ConfigError(f"part: got {self.part!r:.80}, expected a name")
        for name, most in {"max_batch_size": MAX_REQUESTS, "max_batch_frames": MAX_FRAMES}.items():
            check_number(name, getattr(self, name), 1, most, integer=True, raises=ConfigError)
