"""Messages with images, audio and videos -> the prompt of one checkpoint: Qwen3-Omni's processor.

Reads sources and counts tokens; knows no model, only its configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.errors import ConfigError
from vllm_omni.layers.decoder import count_of, sub_config
from vllm_omni.models.qwen3_omni.audio_features import Qwen3OmniAudioFeatures
from vllm_omni.utils.checks import check_number
from vllm_omni.utils.files import read_json
from vllm_omni.worker.ar.media_reading.audio_parts import AudioVisualReader
from vllm_omni.worker.ar.media_reading.spans import MediaClock
from vllm_omni.worker.ar.media_reading.tokens import MediaTokens
from vllm_omni.worker.ar.media_reading.vision import ImageArea
from vllm_omni.worker.ar.prompt_reader import Encode

PLACEHOLDERS = {kind: f"{kind}_token_id" for kind in ("image", "audio", "video")}
TRACK_ENDS = {end: f"audio_{end}_token_id" for end in ("start", "end")}
DEFAULTS: Mapping[str, Any] = {  # transformers', where a file leaves them out
    "image_token_id": 151655,
    "audio_token_id": 151646,
    "video_token_id": 151656,
    "audio_start_token_id": 151647,
    "position_id_per_seconds": 25,
}
N_WINDOW = 50  # half the frames of a piece of audio


class Qwen3OmniPromptReader(AudioVisualReader):
    """Makes prompts for the checkpoint in `folder`."""

    def __init__(self, folder: Path, encode: Encode, limits: LimitsConfig, image_area: ImageArea | None = None) -> None:
        where = folder / "config.json"
        thinker = sub_config(read_json(where), "thinker_config", str(where))
        audio = {"n_window": N_WINDOW, **sub_config(thinker, "audio_config", f"{where}: thinker_config")}
        window = count_of(audio, "n_window", f"{where}: thinker_config.audio_config")
        tokens = _media_tokens(thinker, f"{where}: thinker_config")
        super().__init__(folder, encode, limits, image_area, tokens, Qwen3OmniAudioFeatures(folder, window))


def _media_tokens(thinker: Mapping[str, Any], where: str) -> MediaTokens:
    """ConfigError for a token or a rate that is none."""
    known = {**DEFAULTS, **thinker}
    for key in (*PLACEHOLDERS.values(), *TRACK_ENDS.values()):
        check_number(f"{where}: {key}", known.get(key), 0, integer=True, raises=ConfigError)
    rate = known["position_id_per_seconds"]
    check_number(f"{where}: position_id_per_seconds", rate, 0, above_low=True, raises=ConfigError)
    return MediaTokens(
        placeholders={kind: known[key] for kind, key in PLACEHOLDERS.items()},
        clock=MediaClock(rate, is_continuous=True),
        track_ends={end: known[key] for end, key in TRACK_ENDS.items()},
    )
