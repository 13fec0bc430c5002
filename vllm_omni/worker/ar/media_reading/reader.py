"""Messages with media -> the prompt of one checkpoint: its chat template writes a placeholder for each part, and the
tokens of the part's span stand in its place. Knows no kind of media by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.errors import InvalidRequestError
from vllm_omni.media.messages import MediaPart
from vllm_omni.request import OmniRequest
from vllm_omni.worker.ar.chat import Chat
from vllm_omni.worker.ar.media_prompt import MediaItem, MediaPrompt, content_ids_of
from vllm_omni.worker.ar.media_reading.parts import MediaContent, PartReader, PlannedPart
from vllm_omni.worker.ar.media_reading.spans import MediaSpan, rope_index
from vllm_omni.worker.ar.media_reading.tokens import MediaTokens
from vllm_omni.worker.ar.prompt_reader import Encode, PromptReader
from vllm_omni.worker.background import Stop


@dataclass(frozen=True, slots=True)
class MediaPromptPlan:
    """A prompt whose media have been measured."""

    token_ids: Sequence[int]  # with one placeholder for each part
    parts: Sequence[PlannedPart]

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + sum(planned.span.num_tokens - 1 for planned in self.parts)


class MediaPromptReader(PromptReader[MediaPromptPlan]):
    """What the readers of all families have in common; a family says which tokens there are, and who reads parts."""

    def __init__(self, encode: Encode, limits: LimitsConfig, tokens: MediaTokens, parts: PartReader) -> None:
        self._encode = encode
        self._limits = limits
        self._tokens = tokens
        self._parts = parts

    def plan(self, chat: Chat, parts: Sequence[MediaPart], request: OmniRequest) -> MediaPromptPlan:
        num_images = sum(part.kind == "image" for part in parts)
        if num_images > self._limits.max_images:
            raise InvalidRequestError(
                f"{parts[0].name.partition('[')[0]}: got {num_images} images, expected at most "
                f"{self._limits.max_images} (limits.max_images)"
            )
        planned = [self._parts.measure(part, request) for part in parts]
        token_ids = self._encode(chat)
        self._tokens.check_kinds(token_ids, [part.kind for part in parts])
        return MediaPromptPlan(token_ids, planned)

    def read(self, plan: MediaPromptPlan, stop: Stop) -> MediaPrompt:
        contents = [self._parts.read(planned, stop) for planned in plan.parts]
        token_ids, placed = self._tokens.expand(plan.token_ids, [content.span for content in contents])
        positions, delta = rope_index(len(token_ids), placed, self._tokens.clock)
        items = tuple(
            item
            for (start, span), content in zip(placed, contents, strict=True)
            for item in self._items(start, span, content)
        )
        stop()
        return MediaPrompt(token_ids, content_ids_of(token_ids, items), positions, delta, items)

    def check_request(self, request: OmniRequest) -> None:
        """Nothing, where no key of a request is read."""

    def check_token_ids(self, token_ids: Sequence[int]) -> None:
        self._tokens.check_absent(token_ids)

    def _items(self, start: int, span: MediaSpan, content: MediaContent) -> Iterator[MediaItem]:
        kinds = self._tokens.kinds_of_span(span)
        for kind, inputs in content.inputs.items():
            places = [start + offset for offset, own in enumerate(kinds) if own == kind]
            yield MediaItem(kind, torch.tensor(places), inputs)
