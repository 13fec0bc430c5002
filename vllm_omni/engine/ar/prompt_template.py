"""A template that a stage wraps around the words of a prompt by itself, instead of the tokenizer's chat template, how
many states in front nobody reads, and how pictures stand in it. Knows no tokenizer and reads no picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.utils.checks import brief, check_number
from vllm_omni.worker.ar.chat import Chat
from vllm_omni.worker.ar.media_reading.vision import ImageArea

WORDS = "{}"  # where they go
MAX_AREA, MAX_MULTIPLE = 2**28, 1024


@dataclass(frozen=True, slots=True)
class TemplateImages:
    """How pictures stand in the template: those of a request (its `image`) before the words, others where a message has
    them.
    """

    text: str  # for each, with what the tokenizer knows a picture by; `{}` is its number, from 1 on
    area: int | None = None  # pixels, about, that each is resized to before its processor resizes it; None: as it is
    multiple: int = 32  # of both sides then

    def __post_init__(self) -> None:
        if not self.text or self.text.count(WORDS) > 1:
            raise ConfigError(
                f"text: got {brief(self.text)}, expected a text with at most one {WORDS}, the number of the picture"
            )
        if self.area is not None:
            check_number("area", self.area, 1, MAX_AREA, integer=True, raises=ConfigError)
        check_number("multiple", self.multiple, 1, MAX_MULTIPLE, integer=True, raises=ConfigError)

    @property
    def image_area(self) -> ImageArea | None:
        return None if self.area is None else ImageArea(self.area, self.multiple)


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """What stands around the words of every prompt."""

    text: str  # with one `{}`; other braces, and those of the words, stay as they are
    drop_tokens: int = 0  # first tokens of the whole whose states the ports of the prompt leave out
    images: TemplateImages | None = None  # None: no pictures are read

    def __post_init__(self) -> None:
        if self.text.count(WORDS) != 1:
            raise ConfigError(
                f"text: got {brief(self.text)} with {self.text.count(WORDS)} of {WORDS}, expected one, where the words "
                "of the prompt go"
            )
        check_number("drop_tokens", self.drop_tokens, 0, integer=True, raises=ConfigError)

    @property
    def head(self) -> str:
        """What stands before the words."""
        return self.text.partition(WORDS)[0]

    def render(self, chat: Chat) -> str:
        """The words of a chat of one message of the user, wrapped; InvalidRequestError for any other."""
        if len(chat.messages) != 1 or chat.messages[0].get("role") != "user":
            roles = [message.get("role") for message in chat.messages]
            raise InvalidRequestError(
                f"messages: got the roles {brief(roles)}, expected one message of the role 'user': the stage wraps its "
                "words into a template of its own (prompt_template)"
            )
        head, _, tail = self.text.partition(WORDS)
        return f"{head}{self._words(chat.messages[0].get('content'))}{tail}"

    def _words(self, content: object) -> str:
        """Texts as they are, pictures by their text."""
        if isinstance(content, str):
            return content
        written: list[str] = []
        num_images = 0
        for part in content if isinstance(content, Sequence) else [content]:
            if isinstance(part, Mapping) and part.get("type") == "text":
                written.append(part["text"])
            elif isinstance(part, Mapping) and part.get("type") == "image" and self.images is not None:
                num_images += 1
                written.append(self.images.text.replace(WORDS, str(num_images)))
            else:
                expected = "text" if self.images is None else "text and pictures"
                raise InvalidRequestError(
                    f"messages[0].content: got {brief(part)}, expected {expected}: the stage's prompt_template holds "
                    "no other media"
                )
        return "".join(written)
