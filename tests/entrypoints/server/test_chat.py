"""`/v1/chat/completions` with OpenAI's own client."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from PIL import Image
from support.loopback import http
from support.media import image_bytes, picture, sound_bytes, tone
from support.server import ServerProcess, threads_of_the_server

from vllm_omni import Omni

SCENE = "show me a scarlet ball and play a C4 on a string"


def said(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def picture_of(part: Any) -> bytes:
    """The pixels of a content part."""
    head, _, content = part["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(content))).tobytes()


def test_the_plain_request_gives_what_omni_gives(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny-omni", messages=said(SCENE), modalities=["text"])
    with threads_of_the_server(), Omni("tiny_omni", progress=False) as omni:
        whole = omni.generate({"prompt": SCENE, "outputs": ["thinker"]})[0]
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == (whole.text, "stop")
    assert choice.message.role == "assistant" and answer.object == "chat.completion"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == whole.metrics["thinker"]["tokens"]
    assert answer.usage.prompt_tokens == whole.metrics["thinker"]["prompt_tokens"]
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_is_the_whole_answer_in_pieces(client: OpenAI) -> None:
    """Words, picture and sound, for the same seed."""
    options: dict[str, Any] = {"model": "tiny-omni", "messages": said(SCENE), "seed": 5}
    options |= {"modalities": ["text", "image", "audio"], "audio": {"format": "pcm16"}}
    whole = client.chat.completions.create(**options)
    text, pictures, sound, roles, reasons, usage = "", [], b"", [], [], None
    for chunk in client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            delta: Any = choice.delta
            roles.append(delta.role)
            reasons.append(choice.finish_reason)
            if isinstance(delta.content, str):
                text += delta.content
            elif delta.content:
                pictures += [picture_of(part) for part in delta.content]
            sound += base64.b64decode(getattr(getattr(delta, "audio", None), "data", None) or "")
    content: Any = whole.choices[0].message.content
    assert [{"type": "text", "text": text}] == [part for part in content if part["type"] == "text"]
    assert pictures == [picture_of(part) for part in content if part["type"] == "image_url"]
    assert whole.choices[0].message.audio is not None
    assert sound == base64.b64decode(whole.choices[0].message.audio.data) and len(sound) > 16_000
    assert whole.choices[0].message.audio.transcript == text
    assert roles[0] == "assistant" and not any(roles[1:])
    assert reasons[-1] == "stop" and not any(reasons[:-1])
    cached = {"prompt_tokens_details"}  # of which the second of two alike has more
    assert usage is not None and whole.usage is not None
    assert usage.model_dump(exclude=cached) == whole.usage.model_dump(exclude=cached)


@pytest.mark.parametrize("modalities", [["text"], ["text", "audio"], ["text", "image", "audio"]])
def test_an_answer_can_be_sent_back_as_it_came(client: OpenAI, modalities: list[Any]) -> None:
    """Of its sounds and pictures, which this model does not read, the words count."""
    options: dict[str, Any] = {"model": "tiny-omni", "modalities": ["text"], "temperature": 0}
    audio: Any = {"format": "wav"} if "audio" in modalities else openai.NOT_GIVEN
    answer: Any = client.chat.completions.create(
        model="tiny-omni", messages=said(SCENE), modalities=modalities, audio=audio
    )
    message: Any = answer.choices[0].message
    words = message.content if isinstance(message.content, str) else message.content[0]["text"]
    histories: list[Any] = [message, {"role": "assistant", "content": words}]
    given, plain = (
        client.chat.completions.create(messages=[*said(SCENE), back, *said("thank you")], **options)
        for back in histories
    )
    assert words and given.choices[0].message == plain.choices[0].message


def test_several_answers_in_words_alone_each_stream(client: OpenAI) -> None:
    """Of a graph whose other stages read what the first writes, but do not run for this."""
    options: dict[str, Any] = {"model": "tiny-omni", "messages": said("hello there"), "n": 3, "seed": 5}
    options["modalities"] = ["text"]
    whole = client.chat.completions.create(**options)
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(**options, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices] and all(texts)
    with pytest.raises(openai.BadRequestError, match="n: got 3, expected 1"):
        client.chat.completions.create(**options | {"modalities": ["text", "image"]})


def test_what_an_assistant_said_may_be_its_transcript_alone_and_a_user_has_content(client: OpenAI) -> None:
    heard: Any = {"role": "assistant", "content": None, "audio": {"id": "audio-1", "transcript": "hello"}}
    told: Any = {"role": "assistant", "content": "hello", "refusal": None, "tool_calls": None, "annotations": []}
    options: dict[str, Any] = {"model": "tiny-omni", "modalities": ["text"], "temperature": 0}
    one, other = (
        client.chat.completions.create(messages=[*said("hi"), message, *said("thank you")], **options)
        for message in (heard, told)
    )
    assert one.choices[0].message == other.choices[0].message
    assert one.usage and other.usage and one.usage.prompt_tokens == other.usage.prompt_tokens
    wrong: dict[str, Any] = {
        "content: missing": {"role": "assistant", "content": None, "audio": {"id": "audio-1"}},
        "messages[1]: .*content: missing": {"role": "user", "content": None},
        "audio: is of the assistant": {"role": "user", "content": "x", "audio": {"id": "audio-1"}},
        "messages[1].tool_calls": {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]},
    }
    for words, message in wrong.items():
        with pytest.raises(openai.BadRequestError, match=words.replace("[", r"\[")):
            client.chat.completions.create(model="tiny-omni", messages=[*said("hi"), message])


def test_other_outputs_are_not_computed_unless_asked_for(client: OpenAI, server: ServerProcess) -> None:
    response = http.post(
        f"{server.base_url}/chat/completions",
        json={"model": "tiny-omni", "messages": said(SCENE), "modalities": ["text"]},
        timeout=60,
    )
    run_id = response.json()["id"].removeprefix("chatcmpl-")
    assert set(server.get(f"/v1/requests/{run_id}").json()["metrics"]) == {"thinker"}


def test_a_graph_without_words_draws_the_users_message(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny-image",
        messages=said("a red circle left of a blue square"),
        n=2,
        extra_body={"num_inference_steps": 4},
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    first, second = ([picture_of(part) for part in list(choice.message.content or ())] for choice in answer.choices)
    assert len(first) == len(second) == 1 and first != second


def test_previews_and_progress_come_when_they_are_asked_for(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny-image",
        messages=said("a red circle"),
        stream=True,
        extra_body={"partial_images": 2, "stream_options": {"include_progress": True}},
    )
    chunks: list[Any] = list(stream)
    previews = [c.choices[0].delta.preview for c in chunks if c.choices and hasattr(c.choices[0].delta, "preview")]
    steps = [chunk.progress["image"]["step"] for chunk in chunks if "image" in (getattr(chunk, "progress", None) or {})]
    assert len(previews) == 2 and all(len(picture_of(preview)) == 128 * 128 * 3 for preview in previews)
    assert steps == sorted(steps) and steps[-1] == 9


@pytest.mark.parametrize("stream", [False, True])
def test_every_choice_has_its_own_words_and_log_probabilities(client: OpenAI, stream: bool) -> None:
    options: dict[str, Any] = {"model": "words", "messages": said("hello"), "n": 3, "max_completion_tokens": 6}
    options |= {"temperature": 1.0, "seed": 11, "logprobs": True, "top_logprobs": 2, "extra_body": {"ignore_eos": True}}
    whole = client.chat.completions.create(**options)
    texts = {choice.index: choice.message.content for choice in whole.choices}
    tokens = {choice.index: choice.logprobs.content or [] for choice in whole.choices if choice.logprobs}
    assert sorted(texts) == [0, 1, 2] and len(set(texts.values())) == 3
    assert all(len(entries) == 6 and len(entries[0].top_logprobs) == 2 for entries in tokens.values())
    for index, text in texts.items():
        spelled = bytes(byte for entry in tokens[index] for byte in entry.bytes or ())
        assert spelled.decode(errors="replace") == text
    assert all(entry.logprob <= 0 for entries in tokens.values() for entry in entries)
    if stream:
        streamed: dict[int, str] = dict.fromkeys(texts, "")
        entries: dict[int, list[Any]] = {index: [] for index in texts}
        for chunk in client.chat.completions.create(**options, stream=True):
            for choice in chunk.choices:
                streamed[choice.index] += choice.delta.content or ""
                entries[choice.index] += (choice.logprobs.content or []) if choice.logprobs else []
        assert streamed == texts
        assert entries == tokens


def test_sampling_fields_reach_the_sampler(client: OpenAI) -> None:
    def text(**options: Any) -> str:
        answer = client.chat.completions.create(model="words", messages=said("hello"), max_tokens=8, **options)
        return answer.choices[0].message.content or ""

    greedy = text()
    assert text(temperature=0) == greedy
    assert text(temperature=1.5, seed=1) == text(temperature=1.5, seed=1) != text(temperature=1.5, seed=2)
    assert len(greedy) > 2
    stop = greedy[2]
    assert text(stop=stop) == greedy[: greedy.index(stop)]


def test_media_parts_are_read_by_a_model_that_reads_them(client: OpenAI) -> None:
    image = base64.b64encode(image_bytes(picture(56, 84))).decode()
    sound = base64.b64encode(sound_bytes(tone(0.2))).decode()
    parts = [
        {"type": "text", "text": "what is this?"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
        {"type": "input_audio", "input_audio": {"data": sound, "format": "wav"}},
    ]
    messages: Any = [{"role": "user", "content": parts}]
    with_media = client.chat.completions.create(
        model="tiny-speech", messages=messages, modalities=["text"], max_tokens=2
    )
    alone = client.chat.completions.create(
        model="tiny-speech", messages=said("what is this?"), modalities=["text"], max_tokens=2
    )
    assert with_media.usage is not None and alone.usage is not None
    assert with_media.usage.prompt_tokens > alone.usage.prompt_tokens + 2
    with pytest.raises(
        openai.BadRequestError, match=r"messages\[0\].content\[1\]: got image, which this model does not"
    ):
        client.chat.completions.create(model="tiny-omni", messages=messages)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://example.org/a.png", "fetches nothing"),
        ("http://127.0.0.1/a.png", "fetches nothing"),
        ("file:///etc/passwd", "scheme 'file'"),
        ("/etc/passwd", "no base64"),
        ("data:image/png;base64,!!!", "no base64"),
        ("data:image/png", "without a comma"),
        ("data:image/png;base64,aGVsbG8=", "no whole image"),
    ],
)
def test_a_source_that_cannot_be_had_is_refused(client: OpenAI, url: str, message: str) -> None:
    messages: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        client.chat.completions.create(model="tiny-speech", messages=messages, modalities=["text"])
    assert "/etc" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"temperature": -1}, "temperature"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"modalities": ["video"]}, "modalities[0]"),
        ({"audio": {"voice": "alloy", "format": "midi"}, "modalities": ["text", "audio"]}, "audio.format"),
        ({"audio": {"voice": "nobody", "format": "wav"}, "modalities": ["text", "audio"]}, "voice"),
        ({"extra_body": {"num_inference_step": 3}}, "num_inference_step"),
        ({"extra_body": {"num_inference_steps": 10**7}, "modalities": ["image"]}, "num_inference_steps"),
        ({"extra_body": {"num_inference_steps": 3}, "modalities": ["text"]}, "num_inference_steps"),
        ({"seed": 2**63}, "seed"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"extra_body": {"partial_images": 1}}, "partial_images"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"extra_body": {"extra_params": {"request_id": "x"}}}, "extra_params.request_id"),
        ({"extra_body": {"priority": "urgent"}}, "priority"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_name(client: OpenAI, options: dict[str, Any], param: str) -> None:
    plain: dict[str, Any] = {"model": "tiny-omni", "messages": said("hello")}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{**plain, **options})
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id


def test_neutral_fields_of_other_clients_are_taken(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="words",
        messages=said("hello"),
        max_tokens=2,
        n=1,
        tool_choice="none",
        response_format={"type": "text"},
        service_tier="auto",
        store=False,
        user="somebody",
        metadata={"a": "b"},
        presence_penalty=0,
    )
    assert answer.choices[0].finish_reason in ("length", "stop")


def test_an_unknown_model_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="tiny-omni"):
        client.chat.completions.create(model="gpt-4", messages=said("hello"))


def test_models_say_what_they_read_and_make(client: OpenAI) -> None:
    models: dict[str, Any] = {model.id: model for model in client.models.list()}
    assert set(models) == {"tiny-omni", "tiny-image", "tiny-audio", "tiny-speech", "words", "vectors"}
    assert models["tiny-omni"].output_modalities == ["text", "image", "audio"]
    assert models["tiny-speech"].input_modalities == ["text", "audio", "image", "video"]
    assert models["vectors"].output_modalities == ["embedding"]
    one: Any = client.models.retrieve("tiny-speech")
    assert one.voices == models["tiny-speech"].voices and len(one.voices) == 1


def test_closing_a_stream_aborts_its_request(client: OpenAI, server: ServerProcess) -> None:
    stream = client.chat.completions.create(
        model="tiny-omni",
        messages=said("hello"),
        modalities=["text"],
        stream=True,
        max_tokens=500,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    assert len(server.requests()) == 1
    stream.close()
    assert server.wait_until_idle() < 5
    cancelled = 'vllm_omni_requests_total{model="tiny-omni",route="/v1/chat/completions",status="cancelled"}'
    assert cancelled in server.get("/metrics").text


def test_closing_a_plain_request_aborts_it_too(server: ServerProcess) -> None:
    body = {"model": "tiny-omni", "messages": said("hello"), "modalities": ["text"], "max_tokens": 500}
    with pytest.raises(httpx.ReadTimeout):
        http.post(f"{server.base_url}/chat/completions", json={**body, "ignore_eos": True}, timeout=0.05)
    assert server.wait_until_idle() < 5


def test_the_raw_events_are_as_openai_sends_them(server: ServerProcess) -> None:
    body = {"model": "words", "messages": said("hello"), "max_tokens": 3, "stream": True}
    with http.stream("POST", f"{server.base_url}/chat/completions", json=body, timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        blocks = [block for block in "".join(response.iter_text()).split("\n\n") if block]
    assert all(block.startswith("data: ") for block in blocks)
    assert blocks[-1] == "data: [DONE]"
    chunks = [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
