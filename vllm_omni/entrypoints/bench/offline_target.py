"""A graph in this process, asked without HTTP: the server's own code makes the same requests of the same bodies."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from types import TracebackType

from pydantic import ValidationError
from starlette.requests import HTTPConnection

from vllm_omni.entrypoints.bench.answer import Answer
from vllm_omni.entrypoints.bench.mix import ROUTES, BenchRequest
from vllm_omni.entrypoints.server.context import Call, ServerParts
from vllm_omni.entrypoints.server.http.api_error import as_api_error, error_of
from vllm_omni.entrypoints.server.jobs import JobStore
from vllm_omni.entrypoints.server.models import ModelTable
from vllm_omni.entrypoints.server.monitoring.metrics import ServerMetrics
from vllm_omni.entrypoints.server.routes.chat import chat_outputs, chat_run
from vllm_omni.entrypoints.server.routes.completions import completion_run
from vllm_omni.entrypoints.server.routes.images import image_run
from vllm_omni.entrypoints.server.routes.videos import video_run
from vllm_omni.entrypoints.server.runs import RunTable
from vllm_omni.entrypoints.server.schemas.chat import ChatBody
from vllm_omni.entrypoints.server.schemas.completions import CompletionBody
from vllm_omni.entrypoints.server.schemas.images import ImageBody
from vllm_omni.entrypoints.server.schemas.videos import VideoBody
from vllm_omni.entrypoints.server.settings import ServerSettings
from vllm_omni.errors import ConfigError
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.request import OmniOutput, OmniRequest, new_request_id

KINDS = ("chat", "completion", "image", "video")


class OfflineTarget:
    """One loaded config. An async context manager: entering loads, leaving frees."""

    def __init__(self, pipeline: Pipeline, requests: Sequence[BenchRequest]) -> None:
        for request in requests:
            if request.kind not in KINDS:
                raise ConfigError(
                    f"works.{request.work}.kind: got {request.kind!r}, which `bench offline` does not know "
                    f"({', '.join(KINDS)}); ask for sound as a chat with modalities: [text, audio]"
                )
        settings, runs = ServerSettings(), RunTable()
        self._table = ModelTable({pipeline.config.name: pipeline})
        self._parts = ServerParts(settings, self._table, runs, ServerMetrics(self._table, runs), JobStore(settings))

    async def ask(self, request: BenchRequest, answer: Answer) -> None:
        try:
            made = await self._omni_request(request)
            async with aclosing(self._table.find(None).omni.stream(made, steps=False)) as outputs:
                async for output in outputs:
                    _note(output, answer, has_words=request.kind in ("chat", "completion"))
        except ValidationError as error:
            answer.fail("400", str(error))
        except Exception as error:  # whatever refuses it, in the words of the server
            found = as_api_error(error)
            answer.fail(str(found.status), found.message)

    async def _omni_request(self, request: BenchRequest) -> OmniRequest:
        model, call = self._table.find(None), self._call(request)
        if request.kind == "video":
            return video_run(VideoBody.model_validate(request.body), {}, model, call).request
        body = {**request.body, "stream": True}
        if request.kind == "chat":
            chat = ChatBody.model_validate(body)
            return (await chat_run(chat, model, chat_outputs(chat, model), call)).request
        if request.kind == "completion":
            completion = CompletionBody.model_validate(body)
            return completion_run(completion, completion.prompts[0], 0, model, call).request
        return image_run(ImageBody.model_validate(body), {}, model, model.abilities.images, call).request

    def _call(self, request: BenchRequest) -> Call:
        state = dict.fromkeys(("request_id", "run_id"), new_request_id())
        scope = {"type": "http", "path": ROUTES[request.kind], "headers": [], "state": state}
        return Call(self._parts, HTTPConnection(scope))

    async def __aenter__(self) -> OfflineTarget:
        await self._table.load()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._table.shutdown(drain=False)


def _note(output: OmniOutput, answer: Answer, has_words: bool) -> None:
    """has_words: whether a stream of this kind would carry them."""
    for result in output.results.values():
        is_new = not output.finished or answer.first_text_s is None
        if has_words and is_new and any(completion.text for completion in result.completions):
            answer.note_text()
        if result.previews:
            answer.note_preview()
        if result.audios:
            answer.note_sound()
    if output.finished:
        failure = error_of(output)
        if failure is not None:
            answer.fail(str(failure.status), failure.message)
        answer.num_tokens = sum(len(completion.token_ids) for completion in output.completions) if has_words else 0
