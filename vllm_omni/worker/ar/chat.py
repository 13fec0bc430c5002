"""A chat as a template reads it: its messages, and what a request says of it besides. Knows no template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_omni.errors import InvalidRequestError
from vllm_omni.request import Messages
from vllm_omni.utils.checks import brief
from vllm_omni.utils.plain import as_json

TEMPLATE_KWARGS, TOOLS, CONTINUES = "chat_template_kwargs", "tools", "continue_final_message"
CHAT_KEYS = frozenset({TEMPLATE_KWARGS, TOOLS, CONTINUES})  # of `OmniRequest.fields`
# what a template is given by keys of their own, or what only the function that calls it would read
RESERVED_TEMPLATE_KEYS = (
    *("messages", "conversation", "tools", "add_generation_prompt", "continue_final_message", "tokenize"),
    "chat_template",
)


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages for one template."""

    messages: Messages
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # above the stage's own
    tools: Sequence[Mapping[str, Any]] | None = None  # JSON schemas of functions
    continues: bool = False  # whether the last message is to be continued, and none to be begun

    @classmethod
    def of(cls, messages: Messages, fields: Mapping[str, Any]) -> Chat:
        """fields: of the request; InvalidRequestError for a wrong value of one of CHAT_KEYS."""
        continues = fields.get(CONTINUES)
        if continues is not None and not isinstance(continues, bool):
            raise InvalidRequestError(f"{CONTINUES}: got {brief(continues)}, expected true or false")
        if continues and messages[-1].get("role") != "assistant":
            raise InvalidRequestError(
                f"{CONTINUES}: got a last message of role {brief(messages[-1].get('role'))}, expected 'assistant'"
            )
        if continues and not messages[-1].get("content"):
            raise InvalidRequestError(f"{CONTINUES}: got a last message without content, expected some to continue")
        return cls(messages, _template_kwargs(fields), _tools(fields), bool(continues))


def _template_kwargs(fields: Mapping[str, Any]) -> dict[str, Any]:
    given = fields.get(TEMPLATE_KWARGS)
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise InvalidRequestError(f"{TEMPLATE_KWARGS}: got {brief(given)}, expected a mapping")
    plain: dict[str, Any] = as_json(TEMPLATE_KWARGS, given, raises=InvalidRequestError)
    for name in plain:
        if name in RESERVED_TEMPLATE_KEYS:
            raise InvalidRequestError(f"{TEMPLATE_KWARGS}.{name}: not read there; {_own_key(name)}")
    return plain


def _own_key(name: str) -> str:
    if name in (TOOLS, CONTINUES):
        return f"give {name} as a key of the prompt"
    return "it is set by the stage itself, so leave it out"


def _tools(fields: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    given = fields.get(TOOLS)
    if given is None:
        return None
    plain = as_json(TOOLS, given, raises=InvalidRequestError)
    if not isinstance(plain, list) or not plain or not all(isinstance(tool, dict) for tool in plain):
        raise InvalidRequestError(f"{TOOLS}: got {brief(given)}, expected a non-empty list of mappings (JSON schemas)")
    return plain
