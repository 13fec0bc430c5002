"""The YAML keys of a `music_prompt` stage, and the request keys that it may understand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_omni.errors import ConfigError
from vllm_omni.utils.checks import check_number, did_you_mean

REQUEST_KEYS = frozenset(
    {
        "lyrics",
        "duration_s",
        "bpm",
        "keyscale",
        "timesignature",
        "vocal_language",
        "task_type",
        "audio",
        "reference_audio",
        "audio_codes",
        "repainting_start",
        "repainting_end",
        "audio_cover_strength",
        "instruction",
    }
)
MEDIA_KEYS = frozenset({"audio", "reference_audio"})


@dataclass(frozen=True, slots=True)
class MusicPromptOptions:
    """Durations, and what the model that the prompts are for understands."""

    default_duration_s: float = 60.0  # of requests that neither say it nor bring audio
    min_duration_s: float | None = None  # the model's own limit
    max_duration_s: float | None = None  # the model's own limit, besides `limits.max_duration_s`
    fields: Sequence[str] | None = None  # the request keys that the model understands; None: all of REQUEST_KEYS

    def __post_init__(self) -> None:
        for name in ("default_duration_s", "min_duration_s", "max_duration_s"):
            value = getattr(self, name)
            if value is not None:
                check_number(name, value, 0, above_low=True, raises=ConfigError)
        if self.max_duration_s is not None and self.default_duration_s > self.max_duration_s:
            raise ConfigError(
                f"default_duration_s: got {self.default_duration_s:g}, expected at most max_duration_s "
                f"({self.max_duration_s:g})"
            )
        if self.min_duration_s is not None and self.default_duration_s < self.min_duration_s:
            raise ConfigError(
                f"default_duration_s: got {self.default_duration_s:g}, expected at least min_duration_s "
                f"({self.min_duration_s:g})"
            )
        for name in self.fields or ():
            if name not in REQUEST_KEYS:
                raise ConfigError(f"fields: got {name!r}{did_you_mean(str(name), REQUEST_KEYS)}")

    @property
    def request_keys(self) -> frozenset[str]:
        return REQUEST_KEYS if self.fields is None else frozenset(self.fields)
