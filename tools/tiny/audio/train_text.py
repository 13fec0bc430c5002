"""Trains the tokenizer and the small Qwen3 of tiny-audio. One model does two things: as the thinker of tiny-omni it
rewrites a loose request into lines of canonical words ('scene: ...', 'sound: ...'), and as the sound model's text
encoder it reads prompts in the format of `AceStepPipeline`.

A second loss keeps in every state which token it stands on: the sound model reads the last layer, which would else
forget it for the sake of the next token (a linear probe found the right note in 71% of the states without it).

Every example is a chat, or a prompt in that format with its meaning in canonical words behind it. The loss is on all
tokens, mostly on those of the answer: the states of a prompt know what is meant before it is said.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from tools.tiny.audio.loose import KINDS, request
from tools.tiny.audio.prompt import sound_prompt
from tools.tiny.audio.words import is_held_out, wording
from tools.tiny.audio.world import canonical, sample_sound
from tools.tiny.common.muon import Optimizers
from tools.tiny.common.training import Trainer, mixed_precision
from tools.tiny.image.train_text import CHAT_TEMPLATE, MAX_LENGTH, SPECIAL_TOKENS, model_config

VOCABULARY = 2000
KIND_SHARES = (0.3, 0.3, 0.3, 0.1)
PROMPT_SHARE = 0.45
PROMPT_KIND = "prompt"
PARTS = 4
KEEP_WEIGHT = 0.3  # of the loss on what a state stands on, over what is read
READ_WEIGHT = 0.2  # of the loss on what is read; what is written weighs 1
LYRICS = "# Languages\nen\n\n# Lyric\n<|endoftext|>"  # of a sound without words
END = "<|im_end|>"
MAX_ANSWER = 80
# As GPT-2's, but a note's name ('F#4', 'bb3', 'F sharp 4', 'c#') is one word and other digits stand alone.
NOTE = r" ?[A-Ga-g](?:[#b]| sharp| flat)?(?: ?[345])?(?![\p{L}\p{N}#])"
WORDS = NOTE + r"| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def chat_prompt(words: str) -> str:
    """What the thinker reads; the same as CHAT_TEMPLATE with the generation prompt."""
    return f"<|im_start|>user\n{words}{END}\n<|im_start|>assistant\n"


def example(kind: str, rng: random.Random, *, held_out: bool = False) -> tuple[str, str]:
    """(what the model reads, what it shall write), for training or kept for judging."""
    if kind != PROMPT_KIND:
        words, answer = request(kind, rng, held_out=held_out)
        return chat_prompt(words), answer
    while True:
        sound = sample_sound(rng, held_out=held_out)
        words = wording(sound, rng)
        if is_held_out(words) == held_out:
            return sound_prompt(words, rng.choice((1, 2))), canonical(sound)


def training_example(rng: random.Random) -> tuple[str, str]:
    """(what is read, what is written to the end), of a random kind."""
    kind = PROMPT_KIND if rng.random() < PROMPT_SHARE else rng.choices(KINDS, KIND_SHARES)[0]
    read, answer = example(kind, rng)
    return read, f"{answer}{END}\n"


def train_tokenizer(seed: int, num_examples: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text can be said, over a corpus in which every word of the world is one token."""
    rng = random.Random(seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(("".join(training_example(rng)) + LYRICS for _ in range(num_examples)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        padding_side="right",
    )


def kept_tokenizer(folder: Path, seed: int, num_examples: int) -> PreTrainedTokenizerFast:
    """The run's tokenizer, trained when it starts."""
    if not folder.exists():
        train_tokenizer(seed, num_examples).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def batches(tokenizer: PreTrainedTokenizerFast, rng: random.Random, size: int) -> list[Part]:
    """`size` examples in parts of similar length: (token ids, targets, weights of the targets), each
    [size / PARTS, L], the weights float32 and 0 for padding.
    """
    texts = [training_example(rng) for _ in range(size)]
    read, written = (tokenizer(list(part))["input_ids"] for part in zip(*texts, strict=True))
    rows = sorted(zip(read, written, strict=True), key=lambda row: len(row[0]) + len(row[1]))
    part_size = -(-size // PARTS)
    return [padded(rows[start : start + part_size]) for start in range(0, size, part_size)]


def padded(rows: list[tuple[list[int], list[int]]]) -> Part:
    """rows: (tokens that are read, tokens that are written), the longest last."""
    length = sum(map(len, rows[-1]))
    ids = torch.zeros(len(rows), length + 1, dtype=torch.long)
    weights = torch.zeros(len(rows), length)
    for row, (read, written) in enumerate(rows):
        end = len(read) + len(written)
        ids[row, :end] = torch.tensor(read + written)
        weights[row, : len(read) - 1] = READ_WEIGHT
        weights[row, len(read) - 1 : end - 1] = 1.0
    return ids[:, :-1], ids[:, 1:], weights


def learn(model: Qwen3ForCausalLM, parts: list[Part]) -> float:
    """Gradients of the weighted mean loss over the targets of all parts; returns that loss."""
    all_weights, total = sum(float(weights.sum()) for _, _, weights in parts), 0.0
    num_read = sum(int((weights == READ_WEIGHT).sum()) for _, _, weights in parts)
    for ids, targets, weights in parts:
        said, is_read = weights > 0, weights == READ_WEIGHT
        with mixed_precision():
            states = model.model(input_ids=ids, use_cache=False).last_hidden_state
            logits = model.lm_head(states[said])
            kept = F.linear(model.reader(states[is_read]), model.model.embed_tokens.weight.detach())
        losses = F.cross_entropy(logits.float(), targets[said], reduction="none")
        loss = (losses * weights[said]).sum() / all_weights
        keeping = F.cross_entropy(kept.float(), ids[is_read], reduction="sum") / num_read
        (loss + KEEP_WEIGHT * keeping).backward()
        total += loss.item()
    return total


def fresh_model(vocabulary: int) -> Qwen3ForCausalLM:
    """The language model, and beside it a reader that is not published: states to what they stand on."""
    model = Qwen3ForCausalLM(model_config(vocabulary))
    model.reader = nn.Linear(model.config.hidden_size, model.config.hidden_size)
    return model


@torch.no_grad()
def mistakes(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, kind: str, seed: int, count: int
) -> list[tuple[str, str, str]]:
    """(read, expected, written) of the held-out examples that greedy decoding gets wrong, of `count`."""
    rng = random.Random(seed)
    pairs = [example(kind, rng, held_out=True) for _ in range(count)]
    wrong = []
    for start in range(0, count, 100):
        part = pairs[start : start + 100]
        inputs = tokenizer([read for read, _ in part], return_tensors="pt", padding=True, padding_side="left")
        written = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=MAX_ANSWER,
            do_sample=False,
        )
        texts = tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        wrong += [(*pair, text) for text, pair in zip(texts, part, strict=True) if text != pair[1]]
    return wrong


def accuracies(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, count: int, show: int = 0
) -> dict[str, float]:
    """The share of held-out examples answered exactly, by kind."""
    shares = {}
    for kind in (*KINDS, PROMPT_KIND):
        wrong = mistakes(model, tokenizer, kind, seed, count)
        shares[kind] = 1 - len(wrong) / count
        for read, expected, written in wrong[:show]:
            print(f"  {kind}: {read!r}\n    expected {expected!r}\n    wrote    {written!r}")
    return shares


def train(
    folder: Path, num_steps: int, batch_size: int, learning_rate: float, judged: int, seed: int, num_examples: int
) -> Qwen3ForCausalLM:
    """num_examples: that a new tokenizer is trained on."""
    torch.manual_seed(seed)
    tokenizer = kept_tokenizer(folder / "tokenizer", seed, num_examples)
    model = fresh_model(len(tokenizer))
    optimizer = Optimizers(model, learning_rate, weight_decay=0.05, matrices=("model.layers.",))
    trainer = Trainer(folder, num_steps, model, optimizer)
    rng = random.Random(seed + 1 + trainer.run.step)
    while trainer.begin():
        trainer.step(loss=learn(model, batches(tokenizer, rng, batch_size)))
        if trainer.is_at(200):
            trainer.run.log(**accuracies(model, tokenizer, trainer.run.step, 64))
    trainer.finish()
    model.model.save_pretrained(folder / "text_encoder")  # as `AceStepPipeline` loads it; writing uses the embeddings
    final = accuracies(model, tokenizer, 7, judged, show=10)
    trainer.run.log(**{f"final_{kind}": share for kind, share in final.items()})
    return model


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/tiny-audio/text"))
    parser.add_argument("--steps", type=int, default=2100)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--judged", type=int, default=400, help="held-out examples of each kind in the final judgement")
    parser.add_argument("--examples", type=int, default=40_000, help="that the tokenizer is trained on")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    train(args.folder, args.steps, args.batch_size, args.learning_rate, args.judged, args.seed, args.examples)


if __name__ == "__main__":
    main()
