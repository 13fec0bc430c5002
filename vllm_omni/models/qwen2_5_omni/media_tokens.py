"""The token ids that stand for media, and for time, in one checkpoint's prompts."""

from __future__ import annotations

from pathlib import Path

from vllm_omni.errors import CheckpointError, ConfigError
from vllm_omni.worker.ar.media_reading.spans import MediaClock
from vllm_omni.worker.ar.media_reading.tokens import MediaTokens

MODEL_TYPE = "qwen2_5_omni"


def read_media_tokens(folder: Path) -> MediaTokens:
    """From config.json; CheckpointError where it cannot be read, ConfigError where it is another model's."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the library raises whatever its parsers raise
        raise CheckpointError(f"{folder}: config.json cannot be read ({error})") from error
    if config.model_type != MODEL_TYPE:
        raise ConfigError(f"{folder}: got a {config.model_type}, expected {MODEL_TYPE}, whose prompts hold media")
    thinker = config.thinker_config
    return MediaTokens(
        placeholders={
            "image": thinker.image_token_id,
            "audio": thinker.audio_token_id,
            "video": thinker.video_token_id,
        },
        clock=MediaClock(thinker.position_id_per_seconds, thinker.seconds_per_chunk),
        track_ends={"start": thinker.audio_start_token_id, "end": thinker.audio_end_token_id},
    )
