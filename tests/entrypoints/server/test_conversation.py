"""What a realtime session keeps, and the samples that it sends."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_omni import Audio
from vllm_omni.entrypoints.server.http.api_error import ApiError
from vllm_omni.entrypoints.server.realtime.conversation import MAX_ITEMS, Content, Conversation, Message, prompt_of
from vllm_omni.entrypoints.server.realtime.pcm import PcmPieces, decoded, duration_ms


def message(text: str, item_id: str | None = None) -> Message:
    content = [Content("input_text", text)]
    return Message("user", content) if item_id is None else Message("user", content, item_id)


def test_items_stand_where_they_are_put() -> None:
    conversation = Conversation(1_000)
    assert conversation.add(message("b", "b")) is None
    assert conversation.add(message("d", "d")) == "b"
    assert conversation.add(message("c", "c"), after="b") == "b"
    assert conversation.add(message("a", "a"), after="root") is None
    assert [item.id for item in conversation] == ["a", "b", "c", "d"]
    assert prompt_of(list(conversation), "Be brief.")[:2] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
    ]


def test_a_conversation_is_bounded_in_items_and_in_bytes() -> None:
    many = Conversation(10**9)
    for _ in range(MAX_ITEMS):
        many.add(message("x"))
    with pytest.raises(ApiError, match="1000"):
        many.add(message("x"))
    large = Conversation(1_000)
    large.add(message("x" * 600, "first"))
    with pytest.raises(ApiError, match="larger than"):
        large.add(message("x" * 600))
    with pytest.raises(ApiError, match="larger than"):
        large.add(Message("user", [Content("input_audio", data="x" * 500)]))
    large.delete("first")
    large.add(message("x" * 600))


def test_words_that_were_not_heard_are_cut() -> None:
    conversation = Conversation(1_000)
    conversation.add(Message("assistant", [Content("output_audio", "one two three four", duration_ms=2_000)], "said"))
    conversation.truncate("said", 0, 1_100)
    assert conversation.find("said").content[0].text == "one two"
    conversation.truncate("said", 0, 0)
    assert conversation.find("said").content[0].text == ""


def test_samples_are_read_as_they_are_written() -> None:
    samples = np.array([-(2**15), -1, 0, 1, 2**15 - 1], "<i2")
    pieces = PcmPieces()
    assert pieces.add(decoded(samples.tobytes(), "audio")) + pieces.close() == samples.tobytes()


@pytest.mark.parametrize("rate", [16_000, 24_000, 44_100])
def test_pieces_at_any_rate_give_the_samples_of_the_whole_at_24_khz(rate: int) -> None:
    sound = np.sin(np.arange(rate) / 20).astype(np.float32)
    stereo = np.stack([sound, sound])
    whole, parts = PcmPieces(), PcmPieces()
    expected = whole.add(Audio(stereo, rate)) + whole.close()
    got = b"".join(parts.add(Audio(stereo[:, start : start + 3_001], rate, start)) for start in range(0, rate, 3_001))
    got += parts.add(Audio(stereo, rate)) + parts.close()  # the final output holds all of it again
    assert got == expected and duration_ms(len(got)) == 1_000


@pytest.mark.parametrize("content", [b"", b"x", b"xyz"])
def test_half_a_sample_is_refused(content: bytes) -> None:
    with pytest.raises(ApiError, match="16 bit"):
        decoded(content, "audio")
