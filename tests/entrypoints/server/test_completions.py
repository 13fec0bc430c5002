"""`/v1/completions` and `/v1/embeddings` with OpenAI's own client."""

from __future__ import annotations

import math
from typing import Any

import openai
import pytest
from openai import OpenAI


def test_a_text_and_its_token_ids_are_continued_alike(client: OpenAI) -> None:
    from_ids = client.completions.create(model="words", prompt=[5, 6, 7], max_tokens=5)
    again = client.completions.create(model="words", prompt=[[5, 6, 7]], max_tokens=5)
    assert from_ids.choices[0].text == again.choices[0].text
    assert from_ids.usage is not None and from_ids.usage.prompt_tokens == 3
    text = client.completions.create(model="words", prompt="hello", max_tokens=5)
    assert text.object == "text_completion" and text.choices[0].finish_reason in ("length", "stop")


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_have_n_choices_each_in_turn(client: OpenAI, stream: bool) -> None:
    options: dict[str, Any] = {"model": "words", "prompt": ["hello", "you"], "n": 2, "max_tokens": 4, "seed": 3}
    options |= {"temperature": 1.0, "logprobs": 1, "extra_body": {"ignore_eos": True}}
    whole = client.completions.create(**options)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    for choice in whole.choices:
        assert choice.logprobs is not None and choice.logprobs.tokens is not None
        assert len(choice.logprobs.tokens) == 4
        assert choice.logprobs.text_offset is not None and choice.logprobs.text_offset[0] == 0
    alone = client.completions.create(**{**options, "prompt": "you"})
    assert [choice.text for choice in alone.choices] == [choice.text for choice in whole.choices[2:]]
    if stream:
        texts = dict.fromkeys(range(4), "")
        tokens: dict[int, list[str]] = {index: [] for index in range(4)}
        for chunk in client.completions.create(**options, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                tokens[choice.index] += (choice.logprobs.tokens or []) if choice.logprobs else []
        assert texts == {choice.index: choice.text for choice in whole.choices}
        assert tokens == {choice.index: choice.logprobs.tokens for choice in whole.choices if choice.logprobs}


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"model": "tiny-image"}, "model"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_name(client: OpenAI, options: dict[str, Any], param: str) -> None:
    plain: dict[str, Any] = {"model": "words", "prompt": "hello"}
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{**plain, **options})
    assert (caught.value.param or "").partition("[")[0].partition(".")[0] == param


def test_embeddings_are_unit_vectors_of_the_last_states(client: OpenAI) -> None:
    both = client.embeddings.create(model="vectors", input=["hello", "you"], encoding_format="float")
    alone = client.embeddings.create(model="vectors", input="you")  # the client asks for base64 and decodes it
    assert [item.index for item in both.data] == [0, 1]
    assert math.isclose(sum(x * x for x in both.data[0].embedding), 1, abs_tol=1e-5)
    assert both.data[1].embedding == pytest.approx(alone.data[0].embedding, abs=1e-6)
    assert both.data[0].embedding != both.data[1].embedding
    assert both.usage.prompt_tokens > alone.usage.prompt_tokens > 0


def test_embeddings_are_pooled_and_cut_as_asked(client: OpenAI) -> None:
    def vector(**options: Any) -> list[float]:
        given = client.embeddings.create(model="vectors", input="hello you", encoding_format="float", **options)
        return list(given.data[0].embedding)

    last, mean = vector(), vector(extra_body={"pooling": "mean"})
    assert len(last) == len(mean) and last != mean
    raw = vector(extra_body={"normalize": False})
    norm = math.sqrt(sum(x * x for x in raw))
    assert last == pytest.approx([x / norm for x in raw], abs=1e-5)
    cut = vector(dimensions=4)
    norm = math.sqrt(sum(x * x for x in raw[:4]))
    assert cut == pytest.approx([x / norm for x in raw[:4]], abs=1e-5)
    with pytest.raises(openai.BadRequestError, match="dimensions: got 4096"):
        vector(dimensions=4096)
