"""One response of the model in a session: its run, and the events that tell of it."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

from vllm_omni.entrypoints.server.answers.usage import num_read, num_written
from vllm_omni.entrypoints.server.context import Call
from vllm_omni.entrypoints.server.http.api_error import ApiError, as_api_error
from vllm_omni.entrypoints.server.http.client import cancel
from vllm_omni.entrypoints.server.models import ServedModel
from vllm_omni.entrypoints.server.realtime.conversation import Content, Conversation, Message, prompt_of
from vllm_omni.entrypoints.server.realtime.manner import Manner
from vllm_omni.entrypoints.server.realtime.pcm import PcmPieces, duration_ms
from vllm_omni.entrypoints.server.requests.building import build_request, voice_key
from vllm_omni.entrypoints.server.runs import Run
from vllm_omni.entrypoints.server.schemas.base import Body
from vllm_omni.errors import OmniError
from vllm_omni.params import SamplingParams
from vllm_omni.request import OmniOutput, new_request_id

Send = Callable[[Mapping[str, Any]], Awaitable[None]]
Status = Literal["in_progress", "completed", "cancelled", "failed", "incomplete"]


@dataclass(frozen=True, slots=True)
class AnswerPlan:
    """What is to be answered, and how."""

    call: Call
    model: ServedModel
    manner: Manner
    items: Sequence[Message]  # what was said before
    conversation: Conversation | None  # where the answer goes; None: nowhere
    index: int  # of the answer in the session
    metadata: Mapping[str, str] | None = None

    def run(self) -> Run:
        """ApiError 400 for what cannot be asked of the model."""
        sampling = SamplingParams(max_tokens=self.manner.max_tokens)
        prompt = {**self._prompt(), **voice_key(self.model, self.manner.voice if self._is_heard else None)}
        outputs = self.manner.outputs(self.model)
        made = build_request(self.call, self.model, Body.model_validate({}), prompt, outputs, sampling=sampling)
        made = dataclasses.replace(made, request_id=f"{self.call.run_id}-{self.index}")
        return self.call.begin(made, self.model, wants_parts=True)

    @property
    def _is_heard(self) -> bool:
        return self.manner.modality == "audio"

    def _prompt(self) -> dict[str, Any]:
        messages = prompt_of(self.items, self.manner.instructions)
        if not messages:
            raise ApiError(400, "response: there is nothing to answer; create an item first", code="nothing_to_answer")
        if self.model.abilities.is_chat:
            return {"messages": messages}
        return {"prompt": str(messages[-1]["content"])}  # it reads no conversation: the last thing that was said


class Answer:
    """One response. `cancel` is the client's word; whoever cancels `run` wants no more events."""

    def __init__(self, plan: AnswerPlan, send: Send) -> None:
        self.id = f"resp_{new_request_id()}"
        self._plan = plan
        self._send = send
        self._is_heard = plan.manner.modality == "audio"
        self._content = Content("output_audio" if self._is_heard else "output_text")
        self._item = Message("assistant", [self._content], status="in_progress")
        self._has_begun = False
        self._sound = PcmPieces(plan.manner.speed)
        self._num_bytes = 0  # of sound
        self._cancelled = asyncio.Event()

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """The run ends between two steps; the events say so."""
        self._cancelled.set()

    async def run(self) -> None:
        """All events of it, from response.created to response.done."""
        await self._send({"type": "response.created", "response": self._describe("in_progress")})
        try:
            final = await self._speak(self._plan.run())
        except (ApiError, OmniError) as error:
            about = as_api_error(error).body["error"]
            details = {key: about[key] for key in ("type", "code", "message")}
            await self._end("failed", {"type": "failed", "error": details})
            return
        if final is None:
            await self._end("cancelled", {"type": "cancelled", "reason": "client_cancelled"})
        elif final.finish_reason == "length":
            await self._end("incomplete", {"type": "incomplete", "reason": "max_output_tokens"}, final)
        else:
            await self._end("completed", None, final)

    async def _speak(self, run: Run) -> OmniOutput | None:
        """The final output, all of it sent; None when the client has cancelled it."""
        async with aclosing(self._plan.call.parts.runs.parts(run)) as parts:
            while True:
                output = await self._next(parts)
                if output is None:
                    return None
                await self._send_words(output)
                if self._is_heard:
                    await self._send_sound(output)
                if output.finished:
                    return output

    async def _next(self, parts: AsyncGenerator[OmniOutput, None]) -> OmniOutput | None:
        making = asyncio.ensure_future(anext(parts))
        stopping = asyncio.ensure_future(self._cancelled.wait())
        try:
            await asyncio.wait({making, stopping}, return_when=asyncio.FIRST_COMPLETED)
            return None if self.is_cancelled else making.result()
        finally:
            await cancel(making, stopping)

    async def _send_words(self, output: OmniOutput) -> None:
        given, text = self._content.text, output.text or ""
        new = text[len(given) :] if output.finished else text
        if new:
            self._content.text += new
            await self._begin_item()
            kind = "output_audio_transcript" if self._is_heard else "output_text"
            await self._send({"type": f"response.{kind}.delta", **self._place(), "delta": new})

    async def _send_sound(self, output: OmniOutput) -> None:
        data = b"".join([await asyncio.to_thread(self._sound.add, audio) for audio in output.audios[:1]])
        data += self._sound.close() if output.finished else b""
        if data:
            self._num_bytes += len(data)
            self._content.duration_ms = duration_ms(self._num_bytes)
            await self._begin_item()
            delta = base64.b64encode(data).decode()
            await self._send({"type": "response.output_audio.delta", **self._place(), "delta": delta})

    async def _begin_item(self) -> None:
        if self._has_begun:
            return
        self._has_begun = True
        item = {**self._item.describe(), "content": []}
        where = {"response_id": self.id, "output_index": 0}
        await self._send({"type": "response.output_item.added", **where, "item": item})
        if self._plan.conversation is not None:
            before = self._plan.conversation.add(self._item)
            await self._send({"type": "conversation.item.added", "previous_item_id": before, "item": item})
        await self._send({"type": "response.content_part.added", **self._place(), "part": self._part("")})

    async def _end(self, status: Status, details: Mapping[str, Any] | None, final: OmniOutput | None = None) -> None:
        self._item.status = "completed" if status == "completed" else "incomplete"
        if self._has_begun:
            await self._end_item()
        response = {**self._describe(status, details), "usage": None if final is None else self._usage(final)}
        await self._send({"type": "response.done", "response": response})

    async def _end_item(self) -> None:
        words, place = self._content.text, self._place()
        if self._is_heard:
            await self._send({"type": "response.output_audio.done", **place})
            await self._send({"type": "response.output_audio_transcript.done", **place, "transcript": words})
        else:
            await self._send({"type": "response.output_text.done", **place, "text": words})
        await self._send({"type": "response.content_part.done", **place, "part": self._part(words)})
        item = self._item.describe()
        where = {"response_id": self.id, "output_index": 0}
        await self._send({"type": "response.output_item.done", **where, "item": item})
        if self._plan.conversation is not None:
            await self._send({"type": "conversation.item.done", "item": item})

    def _place(self) -> dict[str, Any]:
        return {"response_id": self.id, "item_id": self._item.id, "output_index": 0, "content_index": 0}

    def _part(self, words: str) -> dict[str, Any]:
        return {"type": "audio", "transcript": words} if self._is_heard else {"type": "text", "text": words}

    def _describe(self, status: Status, details: Mapping[str, Any] | None = None) -> dict[str, Any]:
        plan = self._plan
        return {
            "id": self.id,
            "object": "realtime.response",
            "status": status,
            "status_details": details,
            "output": [self._item.describe()] if self._has_begun else [],
            "conversation_id": None if plan.conversation is None else plan.conversation.id,
            "audio": {"output": plan.manner.describe_output(plan.model)},
            "metadata": plan.metadata,
            "usage": None,
            **plan.manner.describe(),
        }

    def _usage(self, final: OmniOutput) -> dict[str, Any]:
        read, (text, audio) = num_read(self._plan.model, final), num_written(self._plan.model, final)
        return {
            "total_tokens": read + text + audio,
            "input_tokens": read,
            "output_tokens": text + audio,
            "input_token_details": {"text_tokens": read, "audio_tokens": 0, "cached_tokens": 0},
            "output_token_details": {"text_tokens": text, "audio_tokens": audio},
        }
