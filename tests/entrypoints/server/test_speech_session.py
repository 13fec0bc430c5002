"""What a session of `/v1/audio/speech/stream` holds for a client that sends faster than it listens."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from vllm_omni.entrypoints.server.http.api_error import ApiError
from vllm_omni.entrypoints.server.schemas.speech_stream import InputDone, InputText, SessionConfig
from vllm_omni.entrypoints.server.speaking import speech_session
from vllm_omni.entrypoints.server.speaking.open_words import OpenWords
from vllm_omni.entrypoints.server.speaking.speech_session import SpeechSession

UNUSED: Any = None  # socket and call: nothing is sent, and no model asked


class Reader:
    """A Speaker whose words may come in pieces."""

    reads_pieces = True


def session() -> Any:
    made: Any = SpeechSession(UNUSED, UNUSED)
    made._config, made._speaker = SessionConfig(type="session.config"), Reader()
    made._check_length = lambda text, speaker: None
    return made


def test_no_more_wait_to_be_said_than_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech_session, "MAX_QUEUED", 5)

    async def main() -> None:
        flooded = session()
        for _ in range(5):
            await flooded._take(InputDone(type="input.done"))
        for event in (InputDone(type="input.done"), InputText(type="input.text", text="More.")):
            with pytest.raises(ApiError, match="5 sentences and ends wait") as refused:
                await flooded._take(event)
            assert refused.value.status == 429
        assert flooded._queue.qsize() == 5

    asyncio.run(main())


def test_text_without_a_character_is_not_kept() -> None:
    async def main() -> None:
        empty = session()
        await empty._take(InputText(type="input.text", text="Hello"))
        for _ in range(100):
            await empty._take(InputText(type="input.text", text=""))
        words: OpenWords = empty._open
        assert words.text == "Hello" and words._queue.qsize() == 1

    asyncio.run(main())
