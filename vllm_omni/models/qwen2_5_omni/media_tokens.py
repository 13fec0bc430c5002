"""The token ids that stand for media in one checkpoint, and how the tokens of a span follow one another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_omni.errors import CheckpointError, ConfigError
from vllm_omni.models.qwen2_5_omni.positions import MediaClock, MediaSpan

MODEL_TYPE = "qwen2_5_omni"


@dataclass(frozen=True, slots=True)
class MediaTokens:
    """What stands for media, and for time, in the prompts of one checkpoint."""

    placeholders: Mapping[str, int]  # kind -> the token that a chat template writes once, and that a span repeats
    audio_start: int  # these two stand around a video's sound track
    audio_end: int
    clock: MediaClock

    @classmethod
    def of(cls, folder: Path) -> MediaTokens:
        """From config.json; CheckpointError where it cannot be read, ConfigError where it is another model's."""
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # the library raises whatever its parsers raise
            raise CheckpointError(f"{folder}: config.json cannot be read ({error})") from error
        if config.model_type != MODEL_TYPE:
            raise ConfigError(f"{folder}: got a {config.model_type}, expected {MODEL_TYPE}, whose prompts hold media")
        thinker = config.thinker_config
        return cls(
            placeholders={
                "image": thinker.image_token_id,
                "audio": thinker.audio_token_id,
                "video": thinker.video_token_id,
            },
            audio_start=thinker.audio_start_token_id,
            audio_end=thinker.audio_end_token_id,
            clock=MediaClock(thinker.position_id_per_seconds, thinker.seconds_per_chunk),
        )

    def of_span(self, span: MediaSpan) -> list[int]:
        """The tokens that replace the placeholder of a part."""
        tokens = {**self.placeholders, "start": self.audio_start, "end": self.audio_end}
        return [tokens[kind] for kind in self.kinds_of_span(span)]

    def kinds_of_span(self, span: MediaSpan) -> list[str]:
        """For every token of a span the kind that it stands for; "start" and "end" are those of a sound track."""
        kinds = [kind for kind, positions in span.pieces(self.clock) for _ in range(positions.shape[1])]
        return ["start", *kinds, "end"] if span.has_track else kinds
