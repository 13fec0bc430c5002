"""What stands for the tokenizer of a checkpoint that has none: prompts are token ids, and so are answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_omni.engine.ar.tokenizer import TextProcessor
from vllm_omni.errors import InvalidRequestError
from vllm_omni.media.messages import is_messages
from vllm_omni.request import Prompt
from vllm_omni.worker.ar.chat import Chat


class NoTokenizer(TextProcessor):
    """Takes token ids as they are, and gives no text."""

    def __init__(self, model_folder: Path) -> None:
        self.tokenizer = None
        self._model_folder = model_folder

    def start(self) -> None:
        """Nothing renders chats."""

    def close(self) -> None:
        """Nothing was started."""

    def as_messages(self, prompt: Prompt) -> Sequence[Mapping[str, Any]] | None:
        """The messages of a chat, which `encode` refuses."""
        return prompt if is_messages(prompt) else None

    def encode(self, prompt: Prompt | Chat) -> list[int]:
        """Token ids as they came; InvalidRequestError for words."""
        if isinstance(prompt, (str, Chat)) or isinstance(prompt[0], Mapping):
            raise InvalidRequestError(
                f"prompt: got words, expected token ids, since {self._model_folder} has no tokenizer; give "
                "prompt_token_ids, or set the stage's `tokenizer` to the folder of one"
            )
        return [int(token) for token in prompt]  # type: ignore[arg-type]

    @property
    def special_tokens(self) -> dict[str, int]:
        """None are known."""
        return {}

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """No text."""
        return ""
