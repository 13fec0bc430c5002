"""Between words and token ids: the tokenizer with its chat template, text that grows token by token, and stop strings.

Knows no model and no sampling.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.request import Prompt
from vllm_omni.utils.checkpoint_files import reading
from vllm_omni.utils.checks import brief
from vllm_omni.utils.files import read_json

# the files that make a tokenizer, each line enough by itself
TOKENIZER_FILES = (("tokenizer.json",), ("tokenizer_config.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))
TEMPLATE_FILE = "chat_template.json"  # where a checkpoint with a processor keeps it, if not with the tokenizer
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer gives for bytes that are no character yet


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
    ) -> None:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        with reading(f"{folder}: the tokenizer"), _only_errors_logged():
            self.tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        if (folder / TEMPLATE_FILE).is_file():
            self.tokenizer.chat_template = read_json(folder / TEMPLATE_FILE)["chat_template"]
        # A token is decoded at every step, and the library's checks and conversions around that cost more than it does.
        is_plain = isinstance(self.tokenizer, PreTrainedTokenizerFast) and (
            type(self.tokenizer)._decode is PreTrainedTokenizerFast._decode
        )
        self._backend = self.tokenizer.backend_tokenizer if is_plain else None
        self._folder = folder
        self._has_template = bool(self.tokenizer.chat_template)
        self._applies_template = chat_template and self._has_template
        self._template_kwargs = dict(template_kwargs or {})
        self._system_prompt = system_prompt

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a text, of chat messages, or of a list that already holds ids; InvalidRequestError when it
        cannot be done.
        """
        if isinstance(prompt, str):
            if not self._applies_template:
                return self._tokenize(prompt, add_special_tokens=True)
            prompt = [{"role": "user", "content": prompt}]
        if not isinstance(prompt[0], Mapping):
            return [int(token) for token in prompt]  # type: ignore[arg-type]
        return self._tokenize(self._render(prompt), add_special_tokens=False)  # type: ignore[arg-type]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of token ids, exactly as the tokens spell it."""
        if self._backend is not None:
            return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))
        text: str = self.tokenizer.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def _render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        if not self._has_template:
            raise ConfigError(
                f"{self._folder}: the tokenizer has no chat template, which messages need; give the prompt as a string"
            )
        if self._system_prompt is not None and messages[0].get("role") != "system":
            messages = [{"role": "system", "content": self._system_prompt}, *messages]
        try:
            text: str = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=True,
                **self._template_kwargs,
            )
        except Exception as error:  # a template may raise anything over messages it does not like
            raise InvalidRequestError(f"prompt: the chat template does not take these messages ({error})") from error
        return text

    def _tokenize(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"prompt: got text that is not valid Unicode ({error.reason} at {error.start})"
            ) from None
        encoded = self.tokenizer(
            text, add_special_tokens=add_special_tokens, verbose=False
        )  # lengths are checked later
        token_ids: list[int] = encoded["input_ids"]
        return token_ids


class TextStream:
    """The text of one sample as it is written, cut before the first stop string.

    Nothing is given out that could still change: neither half a character nor what may be the beginning of a stop
    string.
    """

    def __init__(self, processor: TextProcessor, stop: Sequence[str], skip_special_tokens: bool) -> None:
        self._processor = processor
        self._stop = tuple(stop)
        self._skip_special_tokens = skip_special_tokens
        self._token_ids: list[int] = []
        self._context_start = 0  # tokens from here on are decoded together, as a tokenizer may join neighbours
        self._read = 0  # tokens before here are in `text`
        self._num_given = 0
        self.text = ""
        self.is_stopped = False

    def push(self, token_id: int, can_stop: bool = True) -> str:
        """Takes the next token; returns the text that is new and certain. `can_stop`: whether a stop string may end the
        text here.
        """
        self._token_ids.append(token_id)
        new = self._decode_new()
        if new and not new.endswith(UNFINISHED):
            self._take(new, can_stop)
        return self._give(len(self.text) - self._held_back())

    def finish(self) -> str:
        """Ends the text; returns what was held back."""
        if not self.is_stopped:
            self._take(self._decode_new(), can_stop=False)
        return self._give(len(self.text))

    def _decode_new(self) -> str:
        old = self._decode(self._token_ids[self._context_start : self._read])
        return self._decode(self._token_ids[self._context_start :])[len(old) :]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._processor.decode(token_ids, self._skip_special_tokens) if token_ids else ""

    def _take(self, new: str, can_stop: bool) -> None:
        before = len(self.text)
        self.text += new
        self._context_start, self._read = self._read, len(self._token_ids)
        found = [self.text.find(stop, max(0, before - len(stop) + 1)) for stop in self._stop] if can_stop else []
        places = [place for place in found if place >= 0]
        if places:
            self.text = self.text[: min(places)]
            self.is_stopped = True

    def _held_back(self) -> int:
        if self.is_stopped:
            return 0
        lengths = range(min(len(self.text), max(map(len, self._stop), default=1) - 1), 0, -1)
        return next((n for n in lengths if any(stop.startswith(self.text[-n:]) for stop in self._stop)), 0)

    def _give(self, end: int) -> str:
        given = self.text[self._num_given : end]
        self._num_given = max(self._num_given, end)
        return given


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
