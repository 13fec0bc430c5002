"""What a language model may bring along to be asked about more than words: the reader of its prompts with media.

Knows no stage and no file format.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, Generic, Protocol, TypeVar

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.media.messages import MediaPart
from vllm_omni.request import OmniRequest
from vllm_omni.worker.ar.chat import Chat
from vllm_omni.worker.ar.media_prompt import MediaPrompt
from vllm_omni.worker.ar.media_reading.vision import ImageArea
from vllm_omni.worker.background import Stop

Encode = Callable[[Chat], list[int]]  # the tokenizer of the checkpoint, with its chat template


class MediaPlan(Protocol):
    """A prompt of which only headers have been read; what its reader needs to read the rest."""

    @property
    def num_tokens(self) -> int:
        """With those that stand for media, as the headers tell it."""


Plan = TypeVar("Plan", bound=MediaPlan)


class PromptReader(ABC, Generic[Plan]):
    """Reads the prompts of one checkpoint that hold media. Safe to ask from any thread."""

    input_media: ClassVar[frozenset[str]]  # the kinds of parts that it reads: "image", "audio", "video"
    request_keys: ClassVar[frozenset[str]] = frozenset()  # the keys of `OmniRequest.fields` that it reads

    @abstractmethod
    def __init__(self, folder: Path, encode: Encode, limits: LimitsConfig, image_area: ImageArea | None = None) -> None:
        """Reads the configuration of the checkpoint in `folder`; ConfigError, CheckpointError. image_area: what
        pictures are resized to before the checkpoint's own way of resizing them.
        """

    @classmethod
    def has_settings(cls, folder: Path) -> bool:
        """Whether the checkpoint says how its media are prepared; without that its model reads text alone."""
        return True

    @abstractmethod
    def plan(self, chat: Chat, parts: Sequence[MediaPart], request: OmniRequest) -> Plan:
        """Tokenises and measures, from headers alone; InvalidRequestError for what they show to be wrong. chat: with
        media as bare parts (`without_sources`), which `parts` are, in order.
        """

    @abstractmethod
    def read(self, plan: Plan, stop: Stop) -> MediaPrompt:
        """The prompt, everything decoded; InvalidRequestError for what cannot be read. Calls `stop` now and then."""

    @abstractmethod
    def check_request(self, request: OmniRequest) -> None:
        """InvalidRequestError for a wrong value of one of `request_keys`."""

    @abstractmethod
    def check_token_ids(self, token_ids: Sequence[int]) -> None:
        """InvalidRequestError for tokens that stand for media in a prompt that brings none."""
