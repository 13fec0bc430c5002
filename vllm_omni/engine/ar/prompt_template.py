"""A template that a stage wraps around the words of a prompt by itself, instead of the tokenizer's chat template, and
how many states in front nobody reads. Knows no tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.utils.checks import brief, check_number
from vllm_omni.worker.ar.chat import Chat

WORDS = "{}"  # where they go


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """What stands around the words of every prompt."""

    text: str  # with one `{}`; other braces, and those of the words, stay as they are
    drop_tokens: int = 0  # first tokens of the whole whose states the ports of the prompt leave out

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
        return f"{head}{_words(chat.messages[0].get('content'))}{tail}"


def _words(content: object) -> str:
    if isinstance(content, str):
        return content
    raise InvalidRequestError(
        f"messages[0].content: got {brief(content)}, expected text: the stage's prompt_template holds no media"
    )
