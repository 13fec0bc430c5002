"""The tokenizer of the small speaking model: byte-level BPE in which every word of the world is one token."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, tensor

from tools.tiny.talker.shapes import MARKS

VOCABULARY = 640  # the bytes, the words with and without a space before them and with a capital
TURN, END, NUM_ROLE, NUM_END = "<|im_start|>assistant\n{}<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>", 3, 5


def trained_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(MARKS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *["assistant\nuser\n"] * len(texts)], trainer)
    return tokenizer


def encoded(tokenizer: Tokenizer, texts: list[str]) -> tuple[list[int], list[Tensor]]:
    """(tokens of the role, tokens of the words of each text), cut as the engine cuts a turn."""
    rows = [tokenizer.encode(TURN.format(text)).ids for text in texts]
    role, end = rows[0][:NUM_ROLE], tokenizer.token_to_id(END)
    if any(row[:NUM_ROLE] != role or row[-NUM_END] != end for row in rows):
        raise ValueError(f"texts: got a turn of {rows[0]}, expected {NUM_ROLE} tokens before and {NUM_END} after words")
    return role, [tensor(row[NUM_ROLE:-NUM_END]) for row in rows]
