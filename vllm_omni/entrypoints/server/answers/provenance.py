"""What the files of one request say of how they were made: seed, parameters, model and version; the caller's words only
where the server was told so (`embed_prompt`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from vllm_omni.entrypoints.server.models import ServedModel
from vllm_omni.entrypoints.server.settings import ServerSettings
from vllm_omni.media.audio import Audio
from vllm_omni.media.metadata import MediaMetadata
from vllm_omni.media.video import Video
from vllm_omni.request import OmniOutput


@dataclass(frozen=True, slots=True)
class Provenance:
    """Of one request to one model."""

    model: ServedModel
    words: str | None = None  # None: the files do not say them
    inputs: Mapping[str, Any] = field(default_factory=dict)  # what else the request asked

    @classmethod
    def of(
        cls, model: ServedModel, settings: ServerSettings, words: str, inputs: Mapping[str, Any] | None = None
    ) -> Provenance:
        is_said = settings.embed_prompt
        plain = {
            key: value
            for key, value in (inputs or {}).items()
            if key not in model.abilities.media_keys and (is_said or not isinstance(value, str))
        }
        return cls(model, words if is_said else None, plain)

    def images(self, output: OmniOutput, stages: Sequence[str]) -> Iterator[tuple[Image.Image, MediaMetadata]]:
        """Every picture of these stages, and what its file says."""
        for stage in stages:
            found = output.results[stage].images if stage in output.results else ()
            for index, image in enumerate(found):
                yield image, self._metadata(output, stage, index, image)

    def videos(self, output: OmniOutput, stages: Sequence[str]) -> Iterator[tuple[Video, MediaMetadata]]:
        """As `images`."""
        for stage in stages:
            found = output.results[stage].videos if stage in output.results else ()
            for index, video in enumerate(found):
                yield video, self._metadata(output, stage, index, video)

    def audios(self, output: OmniOutput, stages: Sequence[str]) -> Iterator[tuple[Audio, MediaMetadata]]:
        """As `images`."""
        for stage in stages:
            found = output.results[stage].audios if stage in output.results else ()
            for index, audio in enumerate(found):
                yield audio, self._metadata(output, stage, index, audio)

    def _metadata(self, output: OmniOutput, stage: str, index: int, sample: Any) -> MediaMetadata:
        model = self.model.config.model
        return MediaMetadata.of(output, stage, index, model=model, sample=sample, prompt=self.words, inputs=self.inputs)
