"""Between words and token ids: the tokenizer, and its chat template where it has one. Knows no model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from vllm_omni.engine.ar.chat.template import ChatTemplate, find_templates
from vllm_omni.engine.ar.prompt_template import PromptTemplate
from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.request import Prompt
from vllm_omni.utils.checkpoint_files import RUST, reading
from vllm_omni.utils.checks import brief
from vllm_omni.utils.files import read_json
from vllm_omni.utils.plain import as_json
from vllm_omni.worker.ar.chat import Chat

MAX_PANIC_CHARS = 200
# the files that make a tokenizer, each line enough by itself
TOKENIZER_FILES = (("tokenizer.json",), ("tokenizer_config.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))


def find_tokenizer(model_folder: Path, configured: Path | None) -> Path | None:
    """The configured folder, else the model's own, else `tokenizer` beside it (as diffusers lays it out); None where
    neither has one. ConfigError for a configured folder without one.
    """
    folders = [model_folder, model_folder.parent / "tokenizer"] if configured is None else [configured]
    for folder in folders:
        if any(all((folder / name).is_file() for name in names) for names in TOKENIZER_FILES):
            return folder
    if configured is None:
        return None
    expected = " or ".join(" and ".join(names) for names in TOKENIZER_FILES)
    raise ConfigError(
        f"tokenizer: found none in {configured}, expected {expected}; set another folder, or leave it out"
    )


def end_of_sequence_ids(model_folder: Path, tokenizer: Any, part: str | None = None) -> frozenset[int]:
    """What ends a text: from generation_config.json, else from config.json (and what it holds of the part), else the
    tokenizer's own; None: there is none.
    """
    files = [model_folder / name for name in ("generation_config.json", "config.json")]
    with reading(f"{model_folder}: eos_token_id"):
        return _end_of_sequence_ids([read_json(file) for file in files if file.is_file()], tokenizer, part)


def _end_of_sequence_ids(configs: Sequence[Mapping[str, Any]], tokenizer: Any, part: str | None) -> frozenset[int]:
    inner = configs[-1] if configs else {}
    inner = inner.get(f"{part}_config", {}) if part else inner
    for config in (*configs, inner, inner.get("text_config", {})):
        ids = config.get("eos_token_id")
        if ids is not None:
            found = frozenset([ids] if isinstance(ids, int) else ids)
            if not all(type(token) is int for token in found):
                raise TypeError(f"got {brief(ids)}, expected an integer or a list of them")
            return found
    own = None if tokenizer is None else tokenizer.eos_token_id
    return frozenset() if own is None else frozenset([own])


class TextProcessor:
    """One tokenizer, read from its folder."""

    def __init__(
        self,
        folder: Path,
        *,
        chat_template: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
        system_prompt: str | None = None,
        prompt_template: PromptTemplate | None = None,
    ) -> None:
        """prompt_template: takes the place of the tokenizer's own."""
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        with reading(f"{folder}: the tokenizer"), _only_errors_logged():
            self.tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        # A token is decoded at every step, and the library's checks and conversions around that cost more than it does.
        is_plain = isinstance(self.tokenizer, PreTrainedTokenizerFast) and (
            type(self.tokenizer)._decode is PreTrainedTokenizerFast._decode
        )
        self._backend = self.tokenizer.backend_tokenizer if is_plain else None
        self._folder = folder
        templates = find_templates(folder, self.tokenizer.chat_template)
        special = {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()}
        values = {**special, **as_json("chat_template_kwargs", template_kwargs or {}, raises=ConfigError)}
        self._template = ChatTemplate(folder, templates, values, system_prompt) if templates else None
        self._prompt_template = prompt_template
        self._applies_template = chat_template and self._template is not None

    def start(self) -> None:
        """Starts what renders chats, where strings become chats, so that the first does not wait for it."""
        if self._template is not None and self._applies_template and self._prompt_template is None:
            self._template.start()

    def close(self) -> None:
        """Ends what renders chats; may be called twice, and the processor may be used afterwards."""
        if self._template is not None:
            self._template.close()

    def as_messages(self, prompt: Prompt) -> Sequence[Mapping[str, Any]] | None:
        """The messages that a prompt is, or that it becomes; None for token ids, and for text that stays as it is."""
        if isinstance(prompt, str):
            is_wrapped = self._applies_template or self._prompt_template is not None
            return [{"role": "user", "content": prompt}] if is_wrapped else None
        return prompt if isinstance(prompt[0], Mapping) else None  # type: ignore[return-value]

    def encode(self, prompt: Prompt | Chat) -> list[int]:
        """Token ids of a text, of chat messages, or of a list that already holds ids; InvalidRequestError when it
        cannot be done.
        """
        if not isinstance(prompt, Chat):
            messages = self.as_messages(prompt)
            if messages is None:
                return self._tokenize(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]  # type: ignore[arg-type]
            prompt = Chat(messages)
        if self._prompt_template is not None:
            return self._tokenize(self._prompt_template.render(prompt))
        if self._template is None:
            raise ConfigError(
                f"{self._folder}: the tokenizer has no chat template, which messages need; give the prompt as a string"
            )
        return self._tokenize(self._template.render(prompt), add_special_tokens=False)

    def special_ends(self, text: str, token_ids: Sequence[int]) -> tuple[int, int]:
        """How many tokens `encode` has put before and behind those of the text itself."""
        plain = self._tokenize(text, add_special_tokens=False)
        spare = len(token_ids) - len(plain)
        for start in range(spare + 1):
            if list(token_ids[start : start + len(plain)]) == plain:
                return start, spare - start
        return 0, 0

    @property
    def pad_token_id(self) -> int | None:
        """What prompts are padded with; None where the tokenizer has no such token."""
        return None if self.tokenizer is None else self.tokenizer.pad_token_id

    def num_tokens(self, text: str) -> int:
        """Of a text as it stands, with the special tokens that the tokenizer puts around any."""
        return len(self._tokenize(text))

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Text -> id of the tokens that `decode` can leave out."""
        added = self.tokenizer.added_tokens_decoder
        return {token.content: number for number, token in added.items() if not self.decode([number], True)}

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of token ids, exactly as the tokens spell it."""
        try:
            if self._backend is not None:
                return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))
            text: str = self.tokenizer.decode(
                list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        except BaseException as error:
            raise _without_panic(error, "cannot decode its own tokens") from None
        return text

    def _tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"prompt: got text that is not valid Unicode ({error.reason} at {error.start})"
            ) from None
        try:  # lengths are checked later
            encoded = self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
        except BaseException as error:
            raise _without_panic(error, "cannot read this text") from None
        token_ids: list[int] = encoded["input_ids"]
        return token_ids


def _without_panic(error: BaseException, what: str) -> BaseException:
    """An error that is no Exception, and would end the loop, as one of a request."""
    if type(error).__module__ != RUST:
        return error
    return InvalidRequestError(f"prompt: the checkpoint's tokenizer {what} ({str(error)[:MAX_PANIC_CHARS]})")


@contextmanager
def _only_errors_logged() -> Iterator[None]:
    """The library reads the model's configuration to find the tokenizer's class, and complains of what it finds there:
    of text tokens beside a vocabulary of codes that they are none of it.
    """
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
