"""Messages with images, audio and videos -> the prompt of one checkpoint: Qwen2.5-Omni's processor.

Reads sources and counts tokens; knows no model, only its configuration.
"""

from __future__ import annotations

from pathlib import Path

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.models.qwen2_5_omni.audio_features import OmniAudioFeatures
from vllm_omni.models.qwen2_5_omni.media_tokens import read_media_tokens
from vllm_omni.worker.ar.media_reading.audio_parts import AudioVisualReader
from vllm_omni.worker.ar.media_reading.vision import ImageArea
from vllm_omni.worker.ar.prompt_reader import Encode


class OmniPromptReader(AudioVisualReader):
    """Makes prompts for the checkpoint in `folder`."""

    def __init__(self, folder: Path, encode: Encode, limits: LimitsConfig, image_area: ImageArea | None = None) -> None:
        tokens, audio = read_media_tokens(folder), OmniAudioFeatures(folder)
        super().__init__(folder, encode, limits, image_area, tokens, audio)
