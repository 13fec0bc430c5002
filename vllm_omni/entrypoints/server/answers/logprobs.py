"""Log probabilities of tokens in the shapes of OpenAI's two text routes."""

from __future__ import annotations

from functools import cache
from typing import Any, cast

from vllm_omni.engine.ar.text_spec import TextSpec
from vllm_omni.entrypoints.server.http.api_error import unsupported
from vllm_omni.entrypoints.server.models import ServedModel
from vllm_omni.request import Completion

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer gives for a part of a character


class _Speller:
    """Token ids as text and as bytes, by the writer's tokenizer."""

    def __init__(self, model: ServedModel) -> None:
        spec = model.pipeline.specs[model.abilities.writer or ""]
        if not isinstance(spec, TextSpec):
            raise unsupported("logprobs", "the model's writer has no tokenizer that could name its tokens")
        self._processor = spec.processor

    def text(self, token_id: int) -> str:
        return self._processor.decode([token_id], skip_special_tokens=False)

    def bytes(self, token_id: int) -> list[int] | None:
        """None for a part of a character of a tokenizer that does not work on bytes."""
        text = self.text(token_id)
        if UNFINISHED not in text:
            return list(text.encode())
        spelled = str(self._processor.tokenizer.convert_ids_to_tokens(token_id))
        known = _bytes_of_letters()
        return [known[letter] for letter in spelled] if all(letter in known for letter in spelled) else None


@cache
def _bytes_of_letters() -> dict[str, int]:
    """How byte-level tokenizers write bytes: printable Latin-1 as itself, the others as what comes after 255.

    Source: GPT-2's encoder (Radford et al., 2019).
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def chat_logprobs(model: ServedModel, completion: Completion, num_top: int, start: int = 0) -> dict[str, Any] | None:
    """Of the tokens from `start` on, each with its `num_top` likeliest; None where there are none."""
    if completion.logprobs is None or len(completion.logprobs) <= start:
        return None
    speller = _Speller(model)
    content = []
    for position in completion.logprobs[start:]:
        entries = [
            {"token": speller.text(token_id), "logprob": value, "bytes": speller.bytes(token_id)}
            for token_id, value in position.items()
        ]
        likeliest = sorted(entries, key=lambda entry: -cast(float, entry["logprob"]))[:num_top]
        content.append({**entries[0], "top_logprobs": likeliest})
    return {"content": content, "refusal": None}


def text_logprobs(model: ServedModel, completion: Completion, start: int = 0, offset: int = 0) -> dict[str, Any] | None:
    """As of `/v1/completions`. offset: characters of the text before the first of these tokens."""
    if completion.logprobs is None or len(completion.logprobs) <= start:
        return None
    speller = _Speller(model)
    tokens, values, tops, offsets = [], [], [], []
    for position in completion.logprobs[start:]:
        named = {speller.text(token_id): value for token_id, value in position.items()}
        token, value = next(iter(named.items()))
        tokens.append(token)
        values.append(value)
        tops.append(named)
        offsets.append(offset)
        offset += len(token)
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}
