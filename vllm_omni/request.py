"""A request on its way in (OmniRequest). Knows no stage and no engine; the names of its answer are found here, too."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from vllm_omni.errors import InvalidRequestError
from vllm_omni.output import Completion, OmniOutput, Progress, RequestStatus, StageResult
from vllm_omni.params import DiffusionParams, SamplingParams, StageParams
from vllm_omni.payload import SavedStage
from vllm_omni.utils.checks import brief, did_you_mean
from vllm_omni.utils.plain import as_dict, as_json, as_list, as_number, is_array

__all__ = [
    "Completion",
    "Messages",
    "OmniOutput",
    "OmniRequest",
    "Progress",
    "Prompt",
    "RequestStatus",
    "StageResult",
    "create_text_request",
    "new_request_id",
]

Messages = Sequence[Mapping[str, Any]]
Prompt = str | Sequence[int] | Messages
Pieces = Iterator[str] | AsyncIterator[str]
P = TypeVar("P", bound=StageParams)

TEXT_KEYS = ("prompt", "prompt_token_ids", "messages")
OWN_KEYS = ("negative_prompt", "request_id", "priority", "timeout_s", "outputs")
PROMPT_KEYS = frozenset({*TEXT_KEYS, *OWN_KEYS})
MAX_ID_LENGTH = 256
MAX_KEYS = 1_000  # of a prompt dict, of parameters by stage
MAX_PROMPT_ITEMS = 1_000_000  # token ids or messages; what a stage takes is far less
MAX_PLAIN_ID = 2**63  # an int below it is looked at no further: what a stage takes is far less


def new_request_id() -> str:
    """Random, so that no two processes and no two moments make the same."""
    return uuid.uuid4().hex


@dataclass(frozen=True, slots=True, kw_only=True)
class OmniRequest:
    """One prompt and all that belongs to it.

    The content of a chat message is a text or a list of parts: {"type": "text", "text": ...} and, for a stage whose
    model reads them, image, audio and video, each with its source under its own name; `sampling_rate` beside an audio
    that is an array, `fps` beside a video. An assistant's message with `tool_calls` may do without. What else a message
    holds is plain JSON and goes to the chat template.
    """

    prompt: Prompt  # text, token ids or chat messages
    request_id: str = field(default_factory=new_request_id)
    negative_prompt: str | None = None
    params: StageParams | Mapping[str, StageParams] | None = None  # for all stages of its type, or by stage
    priority: str = "normal"  # a key of the scheduler's `priority_weights`
    timeout_s: float | None = None  # seconds from admission to the deadline; None takes the config's
    outputs: Sequence[str] | None = None  # of the config's `outputs` those that are wanted; the rest is not computed
    # further inputs by name (`lyrics`, `audio`, ...), each checked by a stage that reads it (StageSpec.request_keys);
    # None is as if it were not there
    fields: Mapping[str, Any] = field(default_factory=dict)
    saved: Mapping[str, SavedStage] = field(default_factory=dict)  # stages that go on from where they were saved
    # a text that comes in pieces while the request runs, in the place of `prompt`, which is '' then; `Omni` reads them
    pieces: Pieces | None = None
    is_open: bool = False  # whether the text comes so; what `pieces` set, and what is left of them for the stages

    def __post_init__(self) -> None:
        if not isinstance(self.request_id, str) or not 0 < len(self.request_id) <= MAX_ID_LENGTH:
            raise InvalidRequestError(
                f"request_id: got {brief(self.request_id)}, expected 1 to {MAX_ID_LENGTH} characters"
            )
        object.__setattr__(self, "prompt", _checked_prompt(self.prompt))
        if not isinstance(self.is_open, bool):
            raise InvalidRequestError(f"is_open: got {brief(self.is_open)}, expected true or false")
        if self.pieces is not None:
            _check_pieces(self.pieces)
            object.__setattr__(self, "is_open", True)
        if self.is_open and self.prompt != "":
            raise InvalidRequestError(f"prompt: got {brief(self.prompt)} beside pieces of a text, expected ''")
        if self.negative_prompt is not None and not isinstance(self.negative_prompt, str):
            raise InvalidRequestError(f"negative_prompt: got {type(self.negative_prompt).__name__}, expected a string")
        if self.timeout_s is not None:
            timeout_s = as_number("timeout_s", self.timeout_s, 0, above_low=True, raises=InvalidRequestError)
            object.__setattr__(self, "timeout_s", timeout_s)
        if not isinstance(self.priority, str):
            raise InvalidRequestError(f"priority: got {brief(self.priority)}, expected a name")
        if self.params is not None and not isinstance(self.params, StageParams):
            object.__setattr__(self, "params", _checked_params(self.params))
        if self.outputs is not None:
            object.__setattr__(self, "outputs", _checked_outputs(self.outputs))
        object.__setattr__(self, "fields", _checked_fields(self.fields))

    @classmethod
    def from_prompt(
        cls, prompt: Prompt | Pieces | Mapping[str, Any], params: StageParams | Mapping[str, StageParams] | None = None
    ) -> OmniRequest:
        """A request from anything that `Omni.generate` takes as a prompt; in a dict, keys beyond PROMPT_KEYS are
        `fields`. An iterator in the place of a text gives its `pieces`.
        """
        if not isinstance(prompt, Mapping):
            return cls(**_text_of(prompt), params=params)
        given = as_dict("prompt", prompt, MAX_KEYS, raises=InvalidRequestError, expected="keys and their values")
        fields = {key: value for key, value in given.items() if key not in PROMPT_KEYS}
        texts = [key for key in TEXT_KEYS if given.get(key) is not None]
        if len(texts) != 1:
            raise InvalidRequestError(
                f"prompt: got {texts or 'none'} of 'prompt', 'prompt_token_ids' and 'messages', expected exactly one"
                + _near_misses(fields)
            )
        rest = {key: given[key] for key in OWN_KEYS if given.get(key) is not None}
        return cls(**_text_of(given[texts[0]]), params=params, fields=fields, **rest)

    def params_for(self, stage: str, params_type: type[P]) -> P:
        """The parameters that the caller gave for one stage, unset where none were given."""
        if isinstance(self.params, Mapping):
            given = self.params.get(stage)
            if given is not None and not isinstance(given, params_type):
                raise InvalidRequestError(
                    f"params[{stage!r}]: got {type(given).__name__}, expected {params_type.__name__}"
                )
            return given if given is not None else params_type()
        return self.params if isinstance(self.params, params_type) else params_type()

    def source_image(self) -> Any:
        """The picture, or the list of them, that is to be edited or looked at: the field `image`, else that of the
        first diffusion parameters that say it; None where nothing does.
        """
        if self.fields.get("image") is not None:
            return self.fields["image"]
        given = self.params.values() if isinstance(self.params, Mapping) else [self.params]
        said = (params.image for params in given if isinstance(params, DiffusionParams))
        return next((image for image in said if image is not None), None)

    def negative_prompt_text(self) -> str:
        """What a picture or a sound is not to be: the first diffusion parameters that say it, else `negative_prompt`,
        else nothing.
        """
        given = self.params.values() if isinstance(self.params, Mapping) else [self.params]
        for params in given:
            if isinstance(params, DiffusionParams) and params.negative_prompt is not None:
                return params.negative_prompt
        return self.negative_prompt or ""


def is_pieces(prompt: object) -> bool:
    """Whether it gives a text piece by piece."""
    return isinstance(prompt, Iterator | AsyncIterator)


def _text_of(prompt: Any) -> dict[str, Any]:
    return {"prompt": "", "pieces": prompt} if is_pieces(prompt) else {"prompt": prompt}


def _check_pieces(pieces: object) -> None:
    if not is_pieces(pieces):
        raise InvalidRequestError(f"pieces: got {type(pieces).__name__}, expected an iterator of strings")


def _checked_prompt(prompt: object) -> Prompt:
    """Text, a list of plain token ids, or a list of messages."""
    expected = "a string, a non-empty list of token ids or of chat messages"
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Mapping) or not (isinstance(prompt, Sequence) or is_array(prompt)):
        raise InvalidRequestError(f"prompt: got {type(prompt).__name__}, expected {expected}")
    items = as_list("prompt", prompt, MAX_PROMPT_ITEMS, raises=InvalidRequestError, expected=expected)
    if not items:
        raise InvalidRequestError(f"prompt: got {type(prompt).__name__}, expected {expected}")
    if all(isinstance(item, Mapping) for item in items):
        return [_checked_message(f"prompt[{index}]", message) for index, message in enumerate(items)]
    return [
        token if type(token) is int and 0 <= token < MAX_PLAIN_ID else _checked_id(index, token)
        for index, token in enumerate(items)
    ]


def _checked_id(index: int, token: object) -> int:
    """A token id of any kind of number, or the complaint about it."""
    checked: int = as_number(
        f"prompt[{index}]", token, 0, raises=InvalidRequestError, integer=True, hint=" (a token id)"
    )
    return checked


def _checked_message(where: str, message: Mapping[Any, Any]) -> dict[str, Any]:
    """A message as a plain mapping; what its parts hold is left as it is. One of the assistant that calls tools needs
    no content.
    """
    expected = "'role' and 'content'"
    given = as_dict(where, message, MAX_KEYS, raises=InvalidRequestError, expected=expected)
    content = given.pop("content", None)
    role, calls = given.get("role"), given.get("tool_calls")
    if not isinstance(role, str) or (content is None and not (role == "assistant" and calls)):
        raise InvalidRequestError(f"{where}: got the keys {brief(list(message))}, expected {expected}")
    plain: dict[str, Any] = as_json(where, given, raises=InvalidRequestError)
    if content is None:
        return plain
    if isinstance(content, str):
        return {**plain, "content": str.__str__(content)}
    parts = "a string or a list of parts"
    most = MAX_PROMPT_ITEMS
    return {**plain, "content": as_list(f"{where}.content", content, most, raises=InvalidRequestError, expected=parts)}


def _checked_outputs(outputs: object) -> tuple[str, ...]:
    expected = "a list of entries of the config's `outputs`"
    given = as_list("outputs", outputs, MAX_KEYS, raises=InvalidRequestError, expected=expected)
    if not given or not all(isinstance(entry, str) for entry in given):
        raise InvalidRequestError(f"outputs: got {brief(given)}, expected {expected}")
    return tuple(dict.fromkeys(given))


def _checked_fields(fields: object) -> dict[str, Any]:
    given = as_dict("fields", fields, MAX_KEYS, raises=InvalidRequestError, expected="a mapping of names to inputs")
    for key in given:
        if not isinstance(key, str) or key in PROMPT_KEYS:
            raise InvalidRequestError(f"fields: got the key {brief(key)}, expected a name other than the request's own")
    return given


def _checked_params(params: object) -> dict[str, Any]:
    expected = "parameters of a stage, or {stage: parameters}"
    given = as_dict("params", params, MAX_KEYS, raises=InvalidRequestError, expected=expected)
    for key in given:
        if not isinstance(key, str):
            raise InvalidRequestError(f"params: got the key {brief(key)}, expected {expected}")
    return given


def _near_misses(fields: Mapping[Any, Any]) -> str:
    """Unknown keys that look like the one that holds the words."""
    near = [f"{key!r:.80}{words}" for key in fields if "mean" in (words := did_you_mean(str(key), TEXT_KEYS))]
    return f"; got {near[0]}" if near else ""


def create_text_request(
    prompt: Prompt,
    request_id: str | None = None,
    sampling_params: SamplingParams | None = None,
    *,
    priority: str = "normal",
    timeout_s: float | None = None,
) -> OmniRequest:
    """A request for text."""
    return OmniRequest(
        prompt=prompt,
        request_id=new_request_id() if request_id is None else request_id,
        params=sampling_params,
        priority=priority,
        timeout_s=timeout_s,
    )
