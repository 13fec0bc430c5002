"""Log probabilities of tokens in the shapes of OpenAI's two text routes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vllm_omni.engine.ar.text_spec import TextSpec
from vllm_omni.entrypoints.server.models import ServedModel
from vllm_omni.request import Completion

Decode = Callable[[int], str]


def decoder(model: ServedModel) -> Decode:
    """Token id -> its text, as the writer's tokenizer spells it."""
    spec = model.pipeline.specs[model.abilities.writer or ""]
    assert isinstance(spec, TextSpec)
    processor = spec.processor
    return lambda token_id: processor.decode([token_id], skip_special_tokens=False)


def chat_logprobs(model: ServedModel, completion: Completion, num_top: int, start: int = 0) -> dict[str, Any] | None:
    """Of the tokens from `start` on, each with its `num_top` likeliest; None where there are none."""
    if completion.logprobs is None or len(completion.logprobs) <= start:
        return None
    decode = decoder(model)
    content = []
    for position in completion.logprobs[start:]:
        entries = [_entry(decode(token_id), value) for token_id, value in position.items()]
        likeliest = sorted(entries, key=lambda entry: -float(entry["logprob"]))[:num_top]
        content.append({**entries[0], "top_logprobs": likeliest})
    return {"content": content, "refusal": None}


def text_logprobs(model: ServedModel, completion: Completion, start: int = 0, offset: int = 0) -> dict[str, Any] | None:
    """As of `/v1/completions`. offset: characters of the text before the first of these tokens."""
    if completion.logprobs is None or len(completion.logprobs) <= start:
        return None
    decode = decoder(model)
    tokens, values, tops, offsets = [], [], [], []
    for position in completion.logprobs[start:]:
        named = {decode(token_id): value for token_id, value in position.items()}
        token, value = next(iter(named.items()))
        tokens.append(token)
        values.append(value)
        tops.append(named)
        offsets.append(offset)
        offset += len(token)
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def _entry(token: str, value: float) -> Mapping[str, Any]:
    """A token that is part of a character has no bytes that could be told from its text."""
    is_whole = "\N{REPLACEMENT CHARACTER}" not in token
    return {"token": token, "logprob": value, "bytes": list(token.encode()) if is_whole else None}
