"""`/v1/completions`: a text, or token ids, continued."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from vllm_omni.entrypoints.server.answers.logprobs import text_logprobs
from vllm_omni.entrypoints.server.answers.merging import merged
from vllm_omni.entrypoints.server.answers.usage import chat_usage
from vllm_omni.entrypoints.server.context import Call, CallOf
from vllm_omni.entrypoints.server.http.api_error import ApiError, unsupported
from vllm_omni.entrypoints.server.http.client import all_of, while_connected
from vllm_omni.entrypoints.server.http.event_stream import event_stream
from vllm_omni.entrypoints.server.http.json_body import JsonRoute
from vllm_omni.entrypoints.server.models import ServedModel
from vllm_omni.entrypoints.server.requests.building import build_request, require
from vllm_omni.entrypoints.server.runs import Run
from vllm_omni.entrypoints.server.schemas.completions import CompletionBody
from vllm_omni.request import Completion, OmniOutput

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/completions", tags=["chat"])
async def create_completion(body: CompletionBody, call: CallOf, request: Request) -> Response:
    """What follows a text; with several prompts, the choices of each in turn."""
    model = call.parts.models.find(body.model)
    require(model, "text", model.abilities.texts)
    if body.stream_options is not None and not body.stream:
        raise unsupported("stream_options", "is of streams alone; say stream: true")
    runs = [completion_run(body, prompt, index, model, call) for index, prompt in enumerate(body.prompts)]
    answer = _Answer(model, call.run_id, body)
    if not body.stream:
        outputs = await while_connected(request, all_of([call.parts.runs.final(run) for run in runs]))
        return JSONResponse(answer.whole(outputs))
    parts = merged([call.parts.runs.parts(run) for run in runs])
    return event_stream(answer.chunks(parts, len(runs)), call.parts.settings)


def completion_run(body: CompletionBody, prompt: Any, index: int, model: ServedModel, call: Call) -> Run:
    """One of the body's prompts as a run, not begun."""
    key = "prompt" if isinstance(prompt, str) else "prompt_token_ids"
    sampling = body.sampling(max_tokens=body.max_tokens, logprobs=body.logprobs)
    made = build_request(call, model, body, {key: prompt}, model.abilities.texts[:1], sampling=sampling)
    if index:
        made = dataclasses.replace(made, request_id=f"{call.run_id}-{index}")
    return call.begin(made, model, wants_parts=body.stream)


class _Answer:
    def __init__(self, model: ServedModel, run_id: str, body: CompletionBody) -> None:
        self._model = model
        self._head = {"id": f"cmpl-{run_id}", "object": "text_completion", "created": int(time.time())}
        self._head["model"] = model.name
        self._n = body.n or 1
        self._wants_usage = body.stream_options is not None and body.stream_options.include_usage
        self._wants_logprobs = body.logprobs is not None
        self._texts: dict[int, str] = {}  # what a stream has given, by choice
        self._num_tokens: dict[int, int] = {}

    def whole(self, outputs: Sequence[OmniOutput]) -> dict[str, Any]:
        for output in outputs:
            _check_text(output)
        choices = [
            self._choice(
                prompt * self._n + index, completion.text, self._logprobs(completion), completion.finish_reason
            )
            for prompt, output in enumerate(outputs)
            for index, completion in enumerate(output.completions)
        ]
        return {**self._head, "choices": choices, "usage": self._usage(outputs)}

    async def chunks(
        self, parts: AsyncGenerator[tuple[int, OmniOutput], None], num_prompts: int
    ) -> AsyncGenerator[dict[str, Any], None]:
        finals: list[OmniOutput] = []
        async with aclosing(parts):
            async for prompt, output in parts:
                for index, completion in enumerate(output.completions):
                    chunk = self._new(prompt * self._n + index, completion, output.finished)
                    if chunk is not None:
                        yield {**self._head, "choices": [chunk]}
                if output.finished:
                    _check_text(output)
                    finals.append(output)
        if self._wants_usage:
            yield {**self._head, "choices": [], "usage": self._usage(finals)}

    def _new(self, number: int, completion: Completion, is_whole: bool) -> dict[str, Any] | None:
        given, num_given = self._texts.get(number, ""), self._num_tokens.get(number, 0)
        text = completion.text[len(given) :] if is_whole else completion.text
        start = num_given if is_whole else 0
        logprobs = self._logprobs(completion, start, len(given))
        self._texts[number] = given + text
        self._num_tokens[number] = num_given + len(completion.token_ids) - start
        if not text and logprobs is None and not is_whole:
            return None
        return self._choice(number, text, logprobs, completion.finish_reason if is_whole else None)

    def _choice(
        self, number: int, text: str, logprobs: Mapping[str, Any] | None, finish_reason: str | None
    ) -> dict[str, Any]:
        return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, completion: Completion, start: int = 0, offset: int = 0) -> dict[str, Any] | None:
        return text_logprobs(self._model, completion, start, offset) if self._wants_logprobs else None

    def _usage(self, outputs: Sequence[OmniOutput]) -> dict[str, int]:
        usages = [chat_usage(self._model, output) for output in outputs]
        return {
            name: sum(usage[name] for usage in usages)
            for name in ("prompt_tokens", "completion_tokens", "total_tokens")
        }


def _check_text(final: OmniOutput) -> None:
    if not final.completions:
        raise ApiError(500, "the model gave no text", code="no_text")
