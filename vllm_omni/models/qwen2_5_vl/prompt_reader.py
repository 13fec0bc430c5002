"""Messages with pictures and videos -> the prompt of one checkpoint: Qwen2.5-VL's processor.

Reads sources and counts tokens; knows no model, only its configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.errors import ConfigError
from vllm_omni.layers.decoder import sub_config
from vllm_omni.utils.checks import check_number
from vllm_omni.utils.files import read_json
from vllm_omni.worker.ar.media_reading.parts import VisionParts
from vllm_omni.worker.ar.media_reading.reader import MediaPromptReader
from vllm_omni.worker.ar.media_reading.spans import MediaClock
from vllm_omni.worker.ar.media_reading.tokens import MediaTokens
from vllm_omni.worker.ar.media_reading.vision import PROCESSOR_FILES, ImageArea, VisionSettings, find_processor
from vllm_omni.worker.ar.prompt_reader import Encode

PLACEHOLDERS = {"image": ("image_token_id", 151655), "video": ("video_token_id", 151656)}  # as published
TOKENS_PER_SECOND = 4  # of the time axis; transformers' default


class Qwen2_5_VLPromptReader(MediaPromptReader):
    """Makes prompts for the checkpoint in `folder`."""

    input_media = VisionParts.input_media

    def __init__(self, folder: Path, encode: Encode, limits: LimitsConfig, image_area: ImageArea | None = None) -> None:
        processor = find_processor(folder)
        if processor is None:
            raise ConfigError(
                f"{folder}: found no {' or '.join(PROCESSOR_FILES)} in it or in `processor` beside it, expected the "
                "settings of its pictures"
            )
        tokens = _media_tokens(read_json(folder / "config.json"), str(folder / "config.json"))
        super().__init__(encode, limits, tokens, VisionParts(VisionSettings.of(processor), limits, image_area))

    @classmethod
    def has_settings(cls, folder: Path) -> bool:
        return find_processor(folder) is not None


def _media_tokens(raw: Mapping[str, Any], where: str) -> MediaTokens:
    """What a config.json says of them; ConfigError for a token or a rate that is none."""
    tokens = {kind: raw.get(key, default) for kind, (key, default) in PLACEHOLDERS.items()}
    for kind, token in tokens.items():
        check_number(f"{where}: {PLACEHOLDERS[kind][0]}", token, 0, integer=True, raises=ConfigError)
    rate = sub_config(raw, "vision_config", where).get("tokens_per_second", TOKENS_PER_SECOND)
    check_number(f"{where}: vision_config.tokens_per_second", rate, 0, above_low=True, raises=ConfigError)
    return MediaTokens(tokens, MediaClock(rate))
