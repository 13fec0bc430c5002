"""What callers pass as prompts and parameters -> requests. A prompt that makes no request becomes a REJECTED output."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_omni.engine.boundary import clear_frames
from vllm_omni.errors import InvalidRequestError, OmniError
from vllm_omni.params import StageParams
from vllm_omni.request import (
    MAX_ID_LENGTH,
    OmniOutput,
    OmniRequest,
    Pieces,
    Prompt,
    RequestStatus,
    is_pieces,
    new_request_id,
)
from vllm_omni.utils.plain import is_array

Params = StageParams | Mapping[str, StageParams]
PromptLike = Prompt | Pieces | Mapping[str, Any] | OmniRequest


def pair(
    prompts: PromptLike | Sequence[PromptLike], params: Params | Sequence[Params | None] | None
) -> list[tuple[PromptLike, Params | None]]:
    """Every prompt with its parameters: one object for all, or a list; InvalidRequestError when the numbers differ."""
    several: list[PromptLike] = list(prompts) if is_batch(prompts) else [prompts]  # type: ignore[arg-type, list-item]
    if not isinstance(params, (list, tuple)):
        return [(prompt, params) for prompt in several]  # type: ignore[misc]
    if len(params) != len(several):
        raise InvalidRequestError(
            f"params: got {len(params)} for {len(several)} prompts, expected one for each, or one object for all"
        )
    return list(zip(several, params, strict=True))


def is_batch(prompts: object) -> bool:
    """Whether a list holds prompts; a list of token ids or of chat messages is itself one prompt."""
    if not isinstance(prompts, Sequence) or isinstance(prompts, (str, bytes)):
        return False
    if not prompts:
        return True
    first = prompts[0]
    if isinstance(first, Mapping):
        try:
            return "role" not in first
        except Exception:  # it is refused when it is read
            return True
    return (
        isinstance(first, (str, Sequence, OmniRequest)) or is_pieces(first) or (is_array(first) and first.shape != ())
    )


def make_request(prompt: PromptLike, params: Params | None) -> OmniRequest | OmniOutput:
    """The request, or the REJECTED output that says why there is none."""
    try:
        if not isinstance(prompt, OmniRequest):
            return OmniRequest.from_prompt(prompt, params)
        if params is not None and prompt.params is not None:
            raise InvalidRequestError("params: got some in the request and some beside it, expected one of them")
        if params is None:
            return prompt
        return dataclasses.replace(prompt, params=params)
    except OmniError as error:
        return rejected(_given_id(prompt) or new_request_id(), error)


def _given_id(prompt: PromptLike) -> str | None:
    """The id that a refused prompt names, where that can be read."""
    try:
        given = prompt.get("request_id") if isinstance(prompt, Mapping) else None
    except Exception:
        return None
    return given if isinstance(given, str) and len(given) <= MAX_ID_LENGTH else None


def rejected(request_id: str, error: OmniError) -> OmniOutput:
    """The final output of a request that was never admitted. Who keeps its error keeps nothing that was read."""
    clear_frames(error)
    return OmniOutput(request_id=request_id, status=RequestStatus.REJECTED, error=error)
