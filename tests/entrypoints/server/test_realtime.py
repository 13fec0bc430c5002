"""The WebSocket `/v1/realtime`, with the realtime client of OpenAI."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest
from openai import OpenAI
from openai.resources.realtime.realtime import RealtimeConnection
from support.server import ServerProcess
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

MODEL = "tiny-speech"


def hear(connection: RealtimeConnection, last: str) -> list[Any]:
    """Events up to one of that type."""
    events: list[Any] = []
    while not events or events[-1].type != last:
        events.append(connection.recv())
        assert events[-1].event_id
        assert last == "error" or events[-1].type != "error", events[-1]
    return events


def tell(connection: RealtimeConnection, text: str, role: Any = "user", **more: Any) -> str:
    """An item; its id."""
    kind = "output_text" if role == "assistant" else "input_text"
    content: Any = [{"type": kind, "text": text}]
    connection.conversation.item.create(item={"type": "message", "role": role, "content": content}, **more)
    added, done = hear(connection, "conversation.item.done")
    assert added.type == "conversation.item.added" and added.item.id == done.item.id
    return str(done.item.id)


def complaint(connection: RealtimeConnection, **event: Any) -> Any:
    connection.send(event)  # type: ignore[arg-type]
    return hear(connection, "error")[-1].error


def sound_of(events: list[Any]) -> np.ndarray:
    data = b"".join(base64.b64decode(event.delta) for event in events if event.type == "response.output_audio.delta")
    return np.frombuffer(data, "<i2")


def said(events: list[Any], kind: str) -> str:
    return "".join(event.delta for event in events if event.type == f"response.{kind}.delta")


def test_a_spoken_answer_comes_in_openais_events(client: OpenAI) -> None:
    with client.realtime.connect(model=MODEL) as connection:
        created, conversation = hear(connection, "conversation.created")
        assert created.type == "session.created" and created.session.model == MODEL
        assert created.session.output_modalities == ["audio"] and created.session.audio.input.turn_detection is None
        audio: Any = {"output": {"voice": "Reader", "format": {"type": "audio/pcm", "rate": 24000}}}
        connection.session.update(session={"type": "realtime", "audio": audio, "tools": [], "tool_choice": "auto"})
        assert hear(connection, "session.updated")[-1].session.audio.output.voice == "Reader"
        asked = tell(connection, "read 3 7 red")
        connection.response.create()
        events = hear(connection, "response.done")
    kinds = list(dict.fromkeys(event.type for event in events))
    assert set(kinds[4:6]) == {"response.output_audio_transcript.delta", "response.output_audio.delta"}
    assert kinds[:4] + kinds[6:] == [
        "response.created",
        "response.output_item.added",
        "conversation.item.added",
        "response.content_part.added",
        "response.output_audio.done",
        "response.output_audio_transcript.done",
        "response.content_part.done",
        "response.output_item.done",
        "conversation.item.done",
        "response.done",
    ]
    added = next(event for event in events if event.type == "conversation.item.added")
    assert added.previous_item_id == asked and added.item.role == "assistant"
    assert said(events, "output_audio_transcript") == "three seven red" and len(sound_of(events)) > 24_000
    response = events[-1].response
    assert (response.status, response.conversation_id) == ("completed", conversation.conversation.id)
    assert response.output[0].content[0].transcript == "three seven red"
    usage = response.usage
    assert usage.output_tokens == usage.output_token_details.text_tokens + usage.output_token_details.audio_tokens
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens and usage.input_tokens > 0
    assert usage.output_token_details.audio_tokens > 20


def test_sound_comes_while_it_is_made(server: ServerProcess, client: OpenAI) -> None:
    with client.realtime.connect(model=MODEL) as connection:
        tell_first = hear(connection, "conversation.created")
        assert tell_first
        tell(connection, "read one two three four five")
        connection.response.create()
        hear(connection, "response.output_audio.delta")
        assert [run["route"] for run in server.requests()] == ["/v1/realtime"]
        hear(connection, "response.done")


def test_a_response_may_be_text_of_other_items_and_leave_no_trace(client: OpenAI) -> None:
    with client.realtime.connect(model=MODEL) as connection:
        hear(connection, "conversation.created")
        tell(connection, "read 3")
        item: Any = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "say blue 4"}]}
        options: Any = {"output_modalities": ["text"], "input": [item], "conversation": "none"}
        connection.response.create(response={**options, "metadata": {"purpose": "test"}})
        events = hear(connection, "response.done")
        assert said(events, "output_text") == "blue four"
        assert not [event for event in events if "audio" in event.type or event.type.startswith("conversation")]
        assert events[-1].response.conversation_id is None
        assert events[-1].response.metadata == {"purpose": "test"}
        connection.response.create(response={"output_modalities": ["text"]})
        assert said(hear(connection, "response.done"), "output_text") == "three"


def test_an_answer_that_is_cut_says_so(client: OpenAI) -> None:
    with client.realtime.connect(model=MODEL) as connection:
        hear(connection, "conversation.created")
        tell(connection, "read 3 7 red")
        connection.response.create(response={"output_modalities": ["text"], "max_output_tokens": 1})
        response = hear(connection, "response.done")[-1].response
    assert (response.status, response.status_details.reason) == ("incomplete", "max_output_tokens")
    assert response.output[0].status == "incomplete" and response.usage.output_tokens == 1


def test_committed_sound_becomes_an_item_that_is_read(client: OpenAI) -> None:
    samples = (np.sin(np.arange(24_000) / 10) * 9_000).astype("<i2").tobytes()
    with client.realtime.connect(model=MODEL) as connection:
        hear(connection, "conversation.created")
        for start in range(0, len(samples), 9_000):
            data = base64.b64encode(samples[start : start + 9_000]).decode()
            connection.input_audio_buffer.append(audio=data)
        connection.input_audio_buffer.commit()
        committed, added, done = hear(connection, "conversation.item.done")
        assert committed.type == "input_audio_buffer.committed" and committed.item_id == added.item.id == done.item.id
        connection.conversation.item.retrieve(item_id=committed.item_id)
        (retrieved,) = hear(connection, "conversation.item.retrieved")
        assert base64.b64decode(retrieved.item.content[0].audio) == samples
        connection.response.create(response={"output_modalities": ["text"], "max_output_tokens": 4})
        heard = hear(connection, "response.done")[-1].response
        connection.conversation.item.delete(item_id=committed.item_id)
        hear(connection, "conversation.item.deleted")
        content: Any = [{"type": "input_audio", "audio": base64.b64encode(samples).decode()}]
        connection.conversation.item.create(item={"type": "message", "role": "user", "content": content})
        hear(connection, "conversation.item.done")
        connection.response.create(response={"output_modalities": ["text"], "max_output_tokens": 4})
        again = hear(connection, "response.done")[-1].response
    # a second of sound is 25 tokens of the prompt; the second prompt holds the first answer besides
    assert heard.usage.input_tokens > 25 and again.usage.input_tokens > heard.usage.input_tokens


def test_the_buffer_is_empty_after_a_clear_and_after_a_commit(client: OpenAI) -> None:
    with client.realtime.connect(model=MODEL) as connection:
        hear(connection, "conversation.created")
        connection.input_audio_buffer.append(audio=base64.b64encode(bytes(4_800)).decode())
        connection.input_audio_buffer.clear()
        hear(connection, "input_audio_buffer.cleared")
        empty = complaint(connection, type="input_audio_buffer.commit", event_id="mine")
        assert (empty.code, empty.event_id) == ("input_audio_buffer_commit_empty", "mine")
        connection.input_audio_buffer.append(audio=base64.b64encode(bytes(3)).decode())
        assert "16 bit" in complaint(connection, type="input_audio_buffer.commit").message
        assert complaint(connection, type="input_audio_buffer.append", audio="not base64!").code == "invalid_media"


def test_a_cancelled_response_ends_and_another_may_follow(server: ServerProcess, client: OpenAI) -> None:
    with client.realtime.connect(model=MODEL) as connection:
        hear(connection, "conversation.created")
        tell(connection, "read one two three four five")
        connection.response.create()
        hear(connection, "response.output_audio.delta")
        busy = complaint(connection, type="response.create")
        assert busy.code == "conversation_already_has_active_response"
        connection.response.cancel()
        events = hear(connection, "response.done")
        response = events[-1].response
        assert (response.status, response.status_details.reason) == ("cancelled", "client_cancelled")
        assert response.output[0].status == "incomplete"
        server.wait_until_idle(10)
        assert complaint(connection, type="response.cancel").code == "response_cancel_not_active"
        connection.response.create(response={"output_modalities": ["text"]})
        assert hear(connection, "response.done")[-1].response.status == "completed"


def test_items_are_kept_in_order_cut_and_deleted(client: OpenAI) -> None:
    with client.realtime.connect(model=MODEL) as connection:
        hear(connection, "conversation.created")
        first = tell(connection, "read 3 7 red")
        connection.response.create()
        item = hear(connection, "response.done")[-1].response.output[0]
        place: Any = {"item_id": item.id, "content_index": 0}
        connection.conversation.item.truncate(**place, audio_end_ms=600)
        hear(connection, "conversation.item.truncated")
        connection.conversation.item.retrieve(item_id=item.id)
        kept = hear(connection, "conversation.item.retrieved")[-1].item.content[0].transcript
        assert "three seven red".startswith(kept) and kept != "three seven red"
        late = complaint(connection, type="conversation.item.truncate", **place, audio_end_ms=60_000)
        assert late.param == "audio_end_ms"
        wrong = complaint(connection, type="conversation.item.truncate", item_id=first, content_index=0, audio_end_ms=0)
        assert wrong.param == "content_index"
        connection.conversation.item.create(
            item={"type": "message", "role": "system", "id": "mine", "content": [{"type": "input_text", "text": "Hi"}]},
            previous_item_id="root",
        )
        added = hear(connection, "conversation.item.done")[0]
        assert added.previous_item_id is None and added.item.id == "mine"
        twice: Any = {"type": "message", "role": "user", "id": "mine", "content": []}
        assert complaint(connection, type="conversation.item.create", item=twice).code == "duplicate_id"
        connection.conversation.item.delete(item_id="mine")
        assert hear(connection, "conversation.item.deleted")[-1].item_id == "mine"
        for kind in ("delete", "retrieve"):
            gone = complaint(connection, type=f"conversation.item.{kind}", item_id="mine")
            assert (gone.code, gone.param) == ("item_not_found", "item_id")


@pytest.mark.parametrize(
    ("param", "session"),
    [
        ("session.audio.input.turn_detection", {"audio": {"input": {"turn_detection": {"type": "server_vad"}}}}),
        ("session.audio.input.transcription", {"audio": {"input": {"transcription": {"model": "whisper-1"}}}}),
        ("session.audio.input.noise_reduction", {"audio": {"input": {"noise_reduction": {"type": "near_field"}}}}),
        ("session.audio.output.format.type", {"audio": {"output": {"format": {"type": "audio/pcmu"}}}}),
        ("session.audio.output.speed", {"audio": {"output": {"speed": 9}}}),
        ("voice", {"audio": {"output": {"voice": "nobody"}}}),
        ("session.tools", {"tools": [{"type": "function", "name": "f"}]}),
        ("session.output_modalities", {"output_modalities": []}),
        ("session.max_output_tokens", {"max_output_tokens": 0}),
        ("session.type", {"type": "transcription"}),
        ("session.model", {"model": "another"}),
        ("session.temperature", {"temperature": 1}),
    ],
)
def test_what_is_not_done_is_refused_by_its_name(client: OpenAI, param: str, session: dict[str, Any]) -> None:
    with client.realtime.connect(model=MODEL) as connection:
        hear(connection, "conversation.created")
        error = complaint(connection, type="session.update", session={"type": "realtime", **session}, event_id="e1")
        assert str(error.param).startswith(param) and error.event_id == "e1"
        connection.session.update(session={"type": "realtime", "instructions": "Read."})
        assert hear(connection, "session.updated")[-1].session.instructions == "Read."


def test_events_that_are_none_are_told_and_the_session_goes_on(server: ServerProcess) -> None:
    url = server.base_url.replace("http", "ws") + f"/realtime?model={MODEL}"
    with connect(url, max_size=None) as socket:
        assert json.loads(socket.recv(timeout=30))["type"] == "session.created"
        assert json.loads(socket.recv(timeout=30))["type"] == "conversation.created"
        wrong: list[Any] = [
            "x",
            "[]",
            '{"type": "response.crate"}',
            '{"type": []}',
            "[" * 100_000,
            b"x",
            '{"type": "response.create"}',
        ]
        wrong += [
            json.dumps({"type": "conversation.item.create", "item": item})
            for item in ({}, {"type": "function_call"}, 7)
        ]
        for message in wrong:
            socket.send(message)
        kinds = []
        while len(kinds) < len(wrong):
            event = json.loads(socket.recv(timeout=30))
            kinds += [event["type"]] if event["type"] in ("error", "response.done") else []
            assert event["type"] != "response.done" or event["response"]["status"] == "failed"
    assert sorted(kinds) == ["error"] * (len(wrong) - 1) + ["response.done"]  # nothing was there to be answered


def test_a_client_who_goes_aborts_its_response(server: ServerProcess, client: OpenAI) -> None:
    with client.realtime.connect(model=MODEL) as connection:
        hear(connection, "conversation.created")
        tell(connection, "read one two three four five")
        connection.response.create()
        hear(connection, "response.output_audio.delta")
        (run,) = server.requests()
    server.wait_until_idle(10)
    assert server.get(f"/v1/requests/{run['id']}").json()["status"] != "finished"


def test_models_that_cannot_converse_are_refused_before_the_session(client: OpenAI) -> None:
    for model, status in (("nobody", 404), ("tiny-image", 400), ("vectors", 400)):
        with pytest.raises(InvalidStatus) as caught, client.realtime.connect(model=model):
            pass
        assert caught.value.response.status_code == status
        assert json.loads(caught.value.response.body or b"")["error"]["param"] == "model"


def test_sound_of_another_rate_is_converted_for_the_client(client: OpenAI) -> None:
    """tiny-audio makes two seconds at 16 kHz, and reads no conversation: what was said last is its prompt."""
    with client.realtime.connect(model="tiny-audio") as connection:
        hear(connection, "conversation.created")
        tell(connection, "C4 then E4, fast")
        connection.response.create()
        events = hear(connection, "response.done")
    assert events[-1].response.status == "completed"
    assert len(sound_of(events)) == 48_000


def test_a_browser_is_let_in_by_its_subprotocols(server: ServerProcess) -> None:
    url = server.base_url.replace("http", "ws") + f"/realtime?model={MODEL}"
    with connect(url, subprotocols=["realtime", "openai-insecure-api-key.some-key"]) as socket:  # type: ignore[list-item]
        assert socket.subprotocol == "realtime"
    with connect(url) as socket:
        assert socket.subprotocol is None
