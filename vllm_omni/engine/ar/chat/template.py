"""The chat template of one tokenizer: where a checkpoint keeps it, and messages through it. Makes no tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_omni.engine.ar.chat.sandbox import TemplateSandbox
from vllm_omni.errors import CheckpointError, ConfigError, InvalidRequestError
from vllm_omni.utils.checks import did_you_mean
from vllm_omni.utils.files import read_json
from vllm_omni.worker.ar.chat import CONTINUES, TEMPLATE_KWARGS, TOOLS, Chat

TEMPLATE_FILE = "chat_template.jinja"  # stands above the other two places
LEGACY_TEMPLATE_FILE = "chat_template.json"  # where an older checkpoint with a processor keeps it
DEFAULT, WITH_TOOLS = "default", "tool_use"  # the names of several templates
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")  # of a message; the first is the usual one
END_MARK = "[[ the message ends here ]]"


def find_templates(folder: Path, of_tokenizer: object) -> dict[str, str]:
    """Name -> template, as transformers finds them: chat_template.jinja, else chat_template.json, else the tokenizer's
    own configuration; none where there is none, CheckpointError for what is no template. of_tokenizer: what the loaded
    tokenizer holds, which is of the first or the last place.
    """
    found, where = of_tokenizer, f"{folder}: the tokenizer's chat_template"
    legacy = folder / LEGACY_TEMPLATE_FILE
    if legacy.is_file() and not (folder / TEMPLATE_FILE).is_file():
        found, where = read_json(legacy).get("chat_template"), f"{legacy}: chat_template"
        if found is None:
            raise CheckpointError(f"{where}: missing; expected a template")
    if found is None or found == "":
        return {}
    templates = {DEFAULT: found} if isinstance(found, str) else found
    if not isinstance(templates, Mapping) or not all(isinstance(text, str) for text in templates.values()):
        raise CheckpointError(f"{where}: got {type(found).__name__}, expected a template, or templates by name")
    return dict(templates)


class ChatTemplate:
    """Renders chats, each in a sandbox.

    folder: for error messages. templates: of `find_templates`, at least one. values: what each is given besides
    (special tokens, the stage's own keys), plain JSON. system_prompt: of chats that bring none.
    """

    def __init__(
        self, folder: Path, templates: Mapping[str, str], values: Mapping[str, Any], system_prompt: str | None
    ) -> None:
        self._folder = folder
        self._templates = templates
        self._values = values
        self._system_prompt = system_prompt
        self._sandbox = TemplateSandbox()

    def start(self) -> None:
        """Starts what renders, so that the first chat does not wait for it."""
        self._sandbox.start()

    def close(self) -> None:
        """Ends what renders; the next chat starts it again."""
        self._sandbox.close()

    def render(self, chat: Chat) -> str:
        """InvalidRequestError for a chat that the template does not take, and where it reads nothing of what the
        request says.
        """
        template = self._choose(chat)
        _check_mentioned(template, TEMPLATE_KWARGS, chat.template_kwargs)
        messages = [_plain_message(message) for message in chat.messages]
        if self._system_prompt is not None and messages[0].get("role") != "system":
            messages = [{"role": "system", "content": self._system_prompt}, *messages]
        if chat.continues:
            messages[-1] = {**messages[-1], "content": _marked(messages[-1]["content"])}
        values = {
            **self._values,
            **chat.template_kwargs,
            "messages": messages,
            "tools": chat.tools,
            "documents": chat.template_kwargs.get("documents"),
            "add_generation_prompt": not chat.continues,
        }
        text = self._sandbox.render(template, values)
        return _cut_at_mark(text) if chat.continues else text

    def _choose(self, chat: Chat) -> str:
        if chat.tools is not None and WITH_TOOLS in self._templates:
            return self._templates[WITH_TOOLS]
        if DEFAULT not in self._templates:
            raise ConfigError(
                f"{self._folder}: got the chat templates {', '.join(sorted(self._templates))}, expected one that is "
                f"called {DEFAULT!r}"
            )
        if chat.tools is not None:
            _check_mentioned(self._templates[DEFAULT], "", (TOOLS,))
        return self._templates[DEFAULT]


def _check_mentioned(template: str, where: str, names: Iterable[str]) -> None:
    """Refuses what the template never reads."""
    words = set(re.findall(r"\w+", template)) if names else set()
    for name in names:
        if name not in words:
            key = f"{where}.{name}" if where else name
            near = did_you_mean(name, words)
            hint = near if near.startswith(" (did") else ""
            raise InvalidRequestError(f"{key}: not read by this model's chat template; leave it out{hint}")


def _plain_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Without keys that hold nothing, which many templates would print; its reasoning under every name for it."""
    given = {key: value for key, value in message.items() if value is not None}
    reasoning = next((given[key] for key in REASONING_KEYS if key in given), None)
    return given if reasoning is None else {"thinking": reasoning, **given, "reasoning_content": reasoning}


def _marked(content: str | Sequence[Mapping[str, Any]]) -> str | list[dict[str, Any]]:
    """The content of the message to continue, its end marked."""
    if isinstance(content, str):
        return f"{content}{END_MARK} "
    parts = [dict(part) for part in content]
    for part in reversed(parts):
        if part.get("type") == "text":
            part["text"] += f"{END_MARK} "
            return parts
    raise InvalidRequestError(f"{CONTINUES}: got a last message without text, expected some to continue")


def _cut_at_mark(text: str) -> str:
    before, mark, after = text.rpartition(END_MARK)
    if not mark:
        raise InvalidRequestError(
            f"{CONTINUES}: the chat template does not write out the last message, so that it cannot be continued"
        )
    return before if after.startswith(" ") else before.rstrip()  # it strips its messages
