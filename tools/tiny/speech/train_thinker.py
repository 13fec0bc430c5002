"""Trains the tokenizer and the thinker of tiny-speech, which rewrites a loose request into the words to be spoken.

The media encoders keep their random weights: it neither looks nor listens. The loss is on all tokens, mostly on those
of the answer.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast, Qwen2_5OmniThinkerForConditionalGeneration

from tools.tiny.common.muon import Optimizers
from tools.tiny.common.tokenizer import trained_tokenizer
from tools.tiny.common.training import Trainer, mixed_precision
from tools.tiny.speech.requests import answer, request
from tools.tiny.speech.shapes import ENDING, PADDING, SPECIAL_TOKENS, thinker_config
from tools.tiny.speech.world import Sentence, sentence

VOCABULARY = 640
MAX_LENGTH = 512
END = SPECIAL_TOKENS[ENDING]
READ_WEIGHT = 0.05  # of the loss on what is read; what is written weighs 1
NAMED = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_bos|><|IMAGE|><|vision_eos|>"
    "{% elif part['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% elif part['type'] == 'video' %}<|vision_bos|><|VIDEO|><|vision_eos|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_prompt(asked: str) -> str:
    """What the thinker reads; the same as CHAT_TEMPLATE with the generation prompt."""
    return f"<|im_start|>user\n{asked}{END}\n<|im_start|>assistant\n"


def example(rng: random.Random, *, held_out: bool = False) -> tuple[str, str]:
    """(what the thinker reads, what it shall write)."""
    words = sentence(rng, held_out=held_out)
    return chat_prompt(request(words, rng)), answer(words)


def train_tokenizer(seed: int, num_examples: int = 10_000) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text can be said, over a corpus in which every word of the world is one token; every
    figure stands alone.
    """
    rng = random.Random(seed)
    texts = ("".join(example(rng)) for _ in range(num_examples))
    tokenizer = trained_tokenizer(texts, VOCABULARY, SPECIAL_TOKENS)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=SPECIAL_TOKENS[PADDING],
        chat_template=CHAT_TEMPLATE,
        extra_special_tokens=NAMED,
        model_max_length=MAX_LENGTH,
        padding_side="right",
    )


def kept_tokenizer(folder: Path, seed: int) -> PreTrainedTokenizerFast:
    """The run's tokenizer, trained when it starts."""
    if not folder.exists():
        train_tokenizer(seed).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def batch(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random, size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(token ids, targets, weights of the targets), each [size, L]; the weights are 0 for padding."""
    read, written = (
        tokenizer(list(part))["input_ids"] for part in zip(*(example(rng) for _ in range(size)), strict=True)
    )
    rows = [(first, [*second, ENDING]) for first, second in zip(read, written, strict=True)]
    length = max(len(first) + len(second) for first, second in rows)
    ids = torch.full((size, length + 1), PADDING)
    weights = torch.zeros(size, length)
    for index, (first, second) in enumerate(rows):
        ids[index, : len(first) + len(second)] = torch.tensor(first + second)
        weights[index, : len(first) - 1] = READ_WEIGHT
        weights[index, len(first) - 1 : len(first) + len(second) - 1] = 1.0
    return ids[:, :-1], ids[:, 1:], weights


@torch.no_grad()
def written(
    model: Qwen2_5OmniThinkerForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, asked: list[str]
) -> list[str]:
    """What the thinker writes for these requests, greedily."""
    inputs = tokenizer([chat_prompt(one) for one in asked], return_tensors="pt", padding=True, padding_side="left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    rows = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=16, do_sample=False, eos_token_id=ENDING)
    texts: list[str] = tokenizer.batch_decode(rows[:, ids.shape[1] :], skip_special_tokens=True)
    return texts


def accuracy(
    model: Qwen2_5OmniThinkerForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, seed: int, count: int
) -> float:
    """The share of requests for held-out sentences that it rewrites into exactly their words."""
    rng = random.Random(seed)
    meant: list[Sentence] = [sentence(rng, held_out=True) for _ in range(count)]
    texts = written(model, tokenizer, [request(words, rng) for words in meant])
    return sum(text == answer(words) for text, words in zip(texts, meant, strict=True)) / count


def train(folder: Path, num_steps: int, batch_size: int, learning_rate: float, judged: int, seed: int) -> None:
    torch.manual_seed(seed)
    tokenizer = kept_tokenizer(folder / "tokenizer", seed)
    model = Qwen2_5OmniThinkerForConditionalGeneration(thinker_config(len(tokenizer)))
    optimizer = Optimizers(model, learning_rate, weight_decay=0.05, matrices=("model.language_model.layers.",))
    trainer = Trainer(folder, num_steps, model, optimizer, decay=0.995)
    rng = random.Random(seed + 1 + trainer.run.step)
    while trainer.begin():
        ids, targets, weights = batch(tokenizer, rng, batch_size)
        with mixed_precision():
            logits = model(input_ids=ids, attention_mask=(weights > 0).long()).logits
        losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        loss = (losses * weights.flatten()).sum() / weights.sum()
        loss.backward()
        trainer.step(loss=loss.detach())
        if trainer.is_at(200):
            trainer.run.log(right=accuracy(model, tokenizer, trainer.run.step, 64))
    trainer.finish()
    model.save_pretrained(folder / "thinker")
    trainer.run.log(final=accuracy(model, tokenizer, 7, judged))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/tiny-speech/thinker"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--judged", type=int, default=400, help="held-out requests in the final judgement")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    train(args.folder, args.steps, args.batch_size, args.learning_rate, args.judged, args.seed)


if __name__ == "__main__":
    main()
