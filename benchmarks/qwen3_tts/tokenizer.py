"""A Qwen2 tokenizer of all bytes and a few words, in the files of a published folder. Imports what both environments
have: tokenizers alone.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import pre_tokenizers

WORDS = ("assistant", "user", "hello", "Ġworld")  # one token each
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tts_pad>", "<tts_text_bos>", "<tts_text_eod>")


def write_text_tokenizer(folder: Path) -> None:
    """A Qwen2 tokenizer of all bytes and a few words."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = vocabulary_and_merges()
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    marks = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {str(len(vocabulary) + place): {"content": token, **marks} for place, token in enumerate(SPECIAL_TOKENS)}
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "processor_class": "Qwen3TTSProcessor",
        "added_tokens_decoder": added,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "errors": "replace",
        "model_max_length": 131072,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def vocabulary_and_merges() -> tuple[dict[str, int], list[str]]:
    """(ids, merges), where every word is built letter by letter."""
    tokens, merges = sorted(pre_tokenizers.ByteLevel.alphabet()), []
    for word in WORDS:
        for stop in range(2, len(word) + 1):
            if word[:stop] not in tokens:
                tokens.append(word[:stop])
                merges.append(f"{word[: stop - 1]} {word[stop - 1]}")
    return {token: place for place, token in enumerate(tokens)}, merges
