"""The YAML keys of a `music_prompt` stage, and what it must know of the model that its prompts are for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_omni.errors import ConfigError
from vllm_omni.utils.checks import check_number, did_you_mean
from vllm_omni.utils.files import read_json

PIPELINE = "AceStepPipeline"
POOL_WINDOW = 5  # latent frames of one audio code, where the folder does not say
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


@dataclass(frozen=True, slots=True)
class MusicPromptOptions:
    """default_duration_s: of requests that neither say it nor bring a sound. min_duration_s, max_duration_s: the
    model's own limits, besides `limits.max_duration_s`. fields: the request keys that the model understands; None: all
    of REQUEST_KEYS.
    """

    default_duration_s: float = 60.0
    min_duration_s: float | None = None
    max_duration_s: float | None = None
    fields: Sequence[str] | None = None

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


@dataclass(frozen=True, slots=True)
class MusicModel:
    """The geometry of an ACE-Step folder. hop: samples of a latent frame. frames_per_code: latent frames of one of the
    audio codes that a language model writes.
    """

    sample_rate: int
    channels: int
    hop: int
    frames_per_code: int

    @classmethod
    def of(cls, folder: Path) -> MusicModel:
        """From model_index.json, vae/config.json and audio_token_detokenizer/config.json (where it is there)."""
        pipeline = read_json(folder / "model_index.json").get("_class_name")
        if pipeline != PIPELINE:
            raise ConfigError(f"model: got a folder of {pipeline!r}, expected one of {PIPELINE!r}")
        where = folder / "vae" / "config.json"
        vae = read_json(where)
        ratios = vae.get("downsampling_ratios")
        if not isinstance(ratios, list) or not ratios:
            raise ConfigError(f"{where}: downsampling_ratios: got {ratios!r}, expected a list of integers")
        codes = folder / "audio_token_detokenizer" / "config.json"
        coder = read_json(codes) if codes.is_file() else {}
        return cls(
            sample_rate=_count(vae, "sampling_rate", where),
            channels=_count(vae, "audio_channels", where),
            hop=math.prod(_count({"downsampling_ratios": ratio}, "downsampling_ratios", where) for ratio in ratios),
            frames_per_code=_count({"pool_window_size": POOL_WINDOW, **coder}, "pool_window_size", codes),
        )

    @property
    def frame_s(self) -> float:
        """Seconds of a latent frame."""
        return self.hop / self.sample_rate


def _count(raw: Mapping[str, Any], key: str, where: Path) -> int:
    check_number(f"{where}: {key}", raw.get(key), 1, integer=True, raises=ConfigError)
    return int(raw[key])
