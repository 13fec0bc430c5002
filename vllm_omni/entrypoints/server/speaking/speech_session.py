"""One WebSocket of `/v1/audio/speech/stream`: text comes in pieces and is said meanwhile, sentence after sentence, or
word by word where the model reads pieces.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from vllm_omni.entrypoints.server.context import Call
from vllm_omni.entrypoints.server.http.api_error import ApiError, as_api_error
from vllm_omni.entrypoints.server.http.client import cancel
from vllm_omni.entrypoints.server.http.event_socket import (
    CLOSED_NORMALLY,
    TIMED_OUT,
    TOO_LARGE,
    EventSocket,
    parse_event,
)
from vllm_omni.entrypoints.server.schemas.speech_stream import (
    EVENTS,
    ClientEvent,
    InputDone,
    InputText,
    SessionClose,
    SessionConfig,
)
from vllm_omni.entrypoints.server.speaking.open_words import OpenWords
from vllm_omni.entrypoints.server.speaking.sentences import Sentences
from vllm_omni.entrypoints.server.speaking.speech import Speaker, Speech, speaker_of
from vllm_omni.errors import OmniError

MAX_EVENT_CHARS = 1_000_000
MAX_QUEUED = 10_000  # sentences and ends of utterances that are not said


@dataclass(frozen=True, slots=True)
class _Sentence:
    """words: None at the end of an utterance, where `index` is the number of its sentences."""

    speaker: Speaker
    config: SessionConfig
    utterance: int
    index: int
    words: str | OpenWords | None

    @property
    def num_chars(self) -> int:
        return len(self.words.text if isinstance(self.words, OpenWords) else self.words or "")

    @property
    def place(self) -> dict[str, int]:
        return {"utterance_index": self.utterance, "sentence_index": self.index}


class SpeechSession:
    """Reads the client's events; a task of its own says what is queued, and ends with the session."""

    def __init__(self, socket: EventSocket, call: Call) -> None:
        self._socket = socket
        self._call = call
        self._config: SessionConfig | None = None
        self._speaker: Speaker | None = None
        self._sentences = Sentences("none")
        self._open: OpenWords | None = None  # the utterance that is said while it comes
        self._queue: asyncio.Queue[_Sentence] = asyncio.Queue()
        self._num_queued = 0  # sentences that are not said yet, and ends of utterances
        self._queued_chars = 0
        self._num_runs = 0
        self._utterance = 0
        self._num_sentences = 0

    async def run(self) -> None:
        """Until the client closes it, goes, or says nothing for too long. ClientGone when it is gone."""
        speaking = asyncio.ensure_future(self._speak())
        reading = asyncio.ensure_future(self._read())
        try:
            await asyncio.wait({speaking, reading}, return_when=asyncio.FIRST_COMPLETED)
            await (reading if reading.done() else speaking)
        finally:
            await cancel(speaking, reading)

    async def _read(self) -> None:
        while True:
            try:
                event = parse_event(EVENTS, await self._receive())
                if isinstance(event, SessionClose):
                    await self._finish()
                    return
                await self._take(event)
            except asyncio.TimeoutError:
                seconds = self._call.parts.settings.body_timeout_s
                await self._complain(ApiError(408, f"nothing came for {seconds:g} s", code="idle_timeout"))
                await self._socket.close(TIMED_OUT)
                return
            except ApiError as error:
                await self._complain(error)
                if error.status == 413:
                    await self._socket.close(TOO_LARGE)
                    return

    async def _receive(self) -> dict[str, Any]:
        """asyncio.TimeoutError when nothing comes while there is nothing to say."""
        while True:
            try:
                return await self._socket.receive(MAX_EVENT_CHARS, self._call.parts.settings.body_timeout_s)
            except asyncio.TimeoutError:
                if not self._num_queued:
                    raise

    async def _finish(self) -> None:
        """What is queued is said yet, unless the client goes."""
        self._close_open()
        waiting = asyncio.ensure_future(self._queue.join())
        leaving = asyncio.ensure_future(self._socket.gone())
        try:
            await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                await self._socket.close(CLOSED_NORMALLY)
        finally:
            await cancel(waiting, leaving)

    async def _take(self, event: ClientEvent) -> None:
        if isinstance(event, SessionConfig):
            await self._configure(event)
        elif self._speaker is None or self._config is None:
            raise ApiError(400, f"{event.type}: session.config must come before it", code="not_configured")
        elif self._num_queued >= MAX_QUEUED:
            words = f"{event.type}: {self._num_queued} sentences and ends wait to be said; send it again later"
            raise ApiError(429, words, code="too_many_sentences")
        elif isinstance(event, InputText):
            self._add(event.text, self._speaker, self._config)
        elif isinstance(event, InputDone):
            self._end_utterance(self._speaker, self._config)

    async def _configure(self, config: SessionConfig) -> None:
        model = self._call.parts.models.find(config.model)
        self._speaker = await speaker_of(self._call, model, config, config)
        if self._open is not None and config.split_granularity != "none":
            self._close_open()
        if self._config is None or config.split_granularity != self._config.split_granularity:
            words = " ".join(self._sentences.flush())
            self._sentences = Sentences(config.split_granularity)
            for sentence in self._sentences.add(words):
                self._enqueue(self._speaker, config, sentence)
        self._config = config

    def _add(self, text: str, speaker: Speaker, config: SessionConfig) -> None:
        """More words of the utterance."""
        if not text or (self._open is not None and self._open.is_over):  # what is wrong with that one has been told
            return
        self._check_length(text, speaker)
        if self._open is not None:
            self._open.add(text)
            self._queued_chars += len(text)
            return
        for words in self._sentences.add(text):
            self._enqueue(speaker, config, words)
        if config.split_granularity == "none" and speaker.reads_pieces:
            for words in self._sentences.take_begun():
                self._open = OpenWords(words)
                self._enqueue(speaker, config, self._open)

    def _check_length(self, text: str, speaker: Speaker) -> None:
        limit = speaker.model.config.limits.max_prompt_chars
        waiting = self._queued_chars + self._sentences.num_chars
        if waiting + len(text) > limit:
            raise ApiError(
                400,
                f"text: got {len(text)} characters beside {waiting} that are not said yet, expected at most {limit} "
                "together (limits.max_prompt_chars)",
                code="too_large",
                param="text",
            )

    def _enqueue(self, speaker: Speaker, config: SessionConfig, words: str | OpenWords) -> None:
        self._put(_Sentence(speaker, config, self._utterance, self._num_sentences, words))
        self._num_sentences += 1

    def _close_open(self) -> None:
        if self._open is not None:
            self._open.end()
            self._open = None

    def _end_utterance(self, speaker: Speaker, config: SessionConfig) -> None:
        self._close_open()
        for words in self._sentences.flush():
            self._enqueue(speaker, config, words)
        self._put(_Sentence(speaker, config, self._utterance, self._num_sentences, None))
        self._utterance, self._num_sentences = self._utterance + 1, 0

    def _put(self, sentence: _Sentence) -> None:
        self._num_queued += 1
        self._queued_chars += sentence.num_chars
        self._queue.put_nowait(sentence)

    async def _speak(self) -> None:
        while True:
            sentence = await self._queue.get()
            if sentence.words is None:
                done = {"utterance_index": sentence.utterance, "total_sentences": sentence.index}
                await self._socket.send({"type": "session.done", **done})
            else:
                await self._say(sentence, sentence.words)
            self._num_queued -= 1
            self._queued_chars -= sentence.num_chars
            self._queue.task_done()

    async def _say(self, sentence: _Sentence, words: str | OpenWords) -> None:
        """One sentence. What goes wrong with it is told, and the next one goes on."""
        run_index, self._num_runs = self._num_runs, self._num_runs + 1
        about: dict[str, Any] = {"error": False}
        try:
            said = words.pieces() if isinstance(words, OpenWords) else words
            speech = sentence.speaker.say(sentence.speaker.run(said, run_index))
            about["total_bytes"] = await self._send_sound(sentence, words, speech)
        except (ApiError, OmniError) as error:
            await self._complain(as_api_error(error), sentence.place)
            about["error"] = True
        finally:
            if isinstance(words, OpenWords):
                words.is_over = True
        await self._socket.send({"type": "audio.done", **sentence.place, **about})

    async def _send_sound(self, sentence: _Sentence, words: str | OpenWords, speech: Speech) -> int:
        """Returns the number of bytes."""
        num_bytes, num_chunks, end_ms = 0, 0, 0
        async with aclosing(speech.pieces()) as pieces:
            async for piece in pieces:
                assert speech.first is not None
                rate = speech.first.sample_rate
                if not num_chunks:
                    await self._socket.send(
                        {
                            "type": "audio.start",
                            **sentence.place,
                            "sentence_text": words if isinstance(words, str) else words.text,
                            "format": sentence.config.response_format,
                            "sample_rate": rate,
                            "channels": speech.first.num_channels,
                        }
                    )
                start_ms, end_ms = end_ms, round(1000 * speech.num_samples / rate / sentence.config.speed)
                if sentence.config.encoding == "binary":
                    await self._socket.send_bytes(piece)
                else:
                    at = {"chunk_id": num_chunks, "chunk_start_ms": start_ms, "chunk_end_ms": end_ms}
                    data = base64.b64encode(piece).decode()
                    await self._socket.send(
                        {"type": "audio.chunk", **sentence.place, "audio_b64": data, **at, "sample_rate": rate}
                    )
                num_bytes, num_chunks = num_bytes + len(piece), num_chunks + 1
        return num_bytes

    async def _complain(self, error: ApiError, place: Mapping[str, int] | None = None) -> None:
        await self._socket.send({"type": "error", **error.body, **(place or {})})
