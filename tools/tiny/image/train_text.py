"""Trains the tokenizer and the small Qwen3 that reads canonical words and rewrites loose ones into them.

Every example is one chat: the user's request (loose, or already canonical) and the scene in canonical words. The
loss is on all tokens, so that the states of a prompt know its grammar too.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tools.tiny.common.muon import Optimizers
from tools.tiny.common.training import Trainer, mixed_precision
from tools.tiny.image.loose import is_held_out, loose
from tools.tiny.image.world import canonical, sample_scene

VOCABULARY = 1024
MAX_LENGTH = 512
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IGNORED = -100


def example(rng: random.Random, canonical_share: float = 0.3) -> tuple[str, str]:
    """(request, scene in canonical words); requests that are held out never appear."""
    while True:
        scene = sample_scene(rng)
        request = canonical(scene) if rng.random() < canonical_share else loose(scene, rng)
        if not is_held_out(request):
            return request, canonical(scene)


def train_tokenizer(seed: int, num_examples: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text can be said, over a corpus in which every word of the world is one token."""
    rng = random.Random(seed)
    corpus = [
        f"{request}\n{scene}\nuser\nassistant\n" for request, scene in (example(rng) for _ in range(num_examples))
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        padding_side="right",
    )


def model_config(vocabulary: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )


def chats(tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]) -> list[list[int]]:
    messages = [
        [{"role": "user", "content": request}, {"role": "assistant", "content": scene}] for request, scene in pairs
    ]
    texts = tokenizer.apply_chat_template(messages, tokenize=False)
    return tokenizer(texts)["input_ids"]


def batch(tokenizer: PreTrainedTokenizerFast, rng: random.Random, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids, targets), both [size, L]; padding carries no loss."""
    rows = chats(tokenizer, [example(rng) for _ in range(size)])
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    targets = torch.tensor([row[1:] + [IGNORED] * (length - len(row) + 1) for row in rows])
    return ids, targets


@torch.no_grad()
def rewriting_accuracy(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, count: int = 128, allow_unseen: bool = False
) -> float:
    """The share of held-out loose requests that greedy decoding turns into exactly the canonical words."""
    rng, pairs = random.Random(seed), []
    while len(pairs) < count:
        scene = sample_scene(rng, allow_unseen=allow_unseen)
        request = loose(scene, rng)
        if is_held_out(request) and scene.has_unseen == allow_unseen:
            pairs.append((request, canonical(scene)))
    prompts = tokenizer.apply_chat_template(
        [[{"role": "user", "content": request}] for request, _ in pairs], tokenize=False, add_generation_prompt=True
    )
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    written = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=48, do_sample=False
    )
    texts = tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(text == scene for text, (_, scene) in zip(texts, pairs, strict=True)) / count


def train(
    folder: Path, num_steps: int, batch_size: int, learning_rate: float, judged: int, seed: int, num_examples: int
) -> Qwen3ForCausalLM:
    """num_examples: that the tokenizer is trained on."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(seed, num_examples)
    model = Qwen3ForCausalLM(model_config(len(tokenizer)))
    optimizer = Optimizers(model, learning_rate, weight_decay=0.05, matrices=("model.layers.",))
    trainer = Trainer(folder, num_steps, model, optimizer)
    rng = random.Random(seed + 1 + trainer.run.step)
    while trainer.begin():
        ids, targets = batch(tokenizer, rng, batch_size)
        with mixed_precision():
            logits = model(input_ids=ids).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        loss.backward()
        trainer.step(loss=loss.detach())
        if trainer.is_at(200):
            seen, unseen = (rewriting_accuracy(model, tokenizer, trainer.run.step, 64, flag) for flag in (False, True))
            trainer.run.log(seen=seen, unseen=unseen)
    trainer.finish()
    model.save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    seen, unseen = (rewriting_accuracy(model, tokenizer, 7, judged, flag) for flag in (False, True))
    trainer.run.log(final_seen=seen, final_unseen=unseen)
    return model


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/tiny-image/text"))
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--judged", type=int, default=400, help="held-out requests in the final judgement")
    parser.add_argument("--examples", type=int, default=40_000, help="that the tokenizer is trained on")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    train(args.folder, args.steps, args.batch_size, args.learning_rate, args.judged, args.seed, args.examples)


if __name__ == "__main__":
    main()
