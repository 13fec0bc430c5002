"""Trains the talker of tiny-speech: the thinker's states in, codes of speech out, fed as when a reply is spoken.

A second loss asks the middle of the network which word is being said (its reader is not published): to know that,
it has to count the pauses so far, which the next code alone hardly teaches. Some of the codes that it is fed are wrong,
so that it learns to go on after its own mistakes.

Legend: B rows, T tokens of a prompt, L tokens of a row, E width of the thinker's states, D of the talker's.
"""

from __future__ import annotations

import argparse
import difflib
import random
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    PreTrainedTokenizerFast,
    Qwen2_5OmniTalkerForConditionalGeneration,
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from tools.tiny.common.muon import Optimizers
from tools.tiny.common.training import Trainer, mixed_precision
from tools.tiny.speech.codes import Codebook
from tools.tiny.speech.requests import answer, request
from tools.tiny.speech.shapes import PADDING, READER, TALKER_SIZE, talker_config
from tools.tiny.speech.talker_data import NO_WORD, Spoken, kept_sentences, sentences
from tools.tiny.speech.train_thinker import chat_prompt

IGNORED = -100
PARTS = 4
WRONG_SHARE = 0.04  # of the codes that are fed
PLACE_WEIGHT = 0.3
MIDDLE = 2  # layers before the question which word is being said


class Text:
    """The thinker's rows of requests and their answers."""

    def __init__(self, thinker: Qwen2_5OmniThinkerForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
        self.thinker, self.tokenizer = thinker.eval().requires_grad_(False), tokenizer
        self.embeddings = thinker.get_input_embeddings().weight.detach()

    def rows(self, asked: list[str], answers: list[str]) -> list[tuple[Tensor, Tensor]]:
        """(prompt [T, E], reply [R, E]) of each: embedding and last state summed."""
        read, written = (self.tokenizer(texts)["input_ids"] for texts in (list(map(chat_prompt, asked)), answers))
        lengths = [len(first) + len(second) for first, second in zip(read, written, strict=True)]
        ids = torch.full((len(read), max(lengths)), PADDING)
        for index, (first, second) in enumerate(zip(read, written, strict=True)):
            ids[index, : lengths[index]] = torch.tensor(first + second)
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        with torch.no_grad():
            states = self.thinker(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        summed = states[0] + states[-1]
        return [(row[: len(first)], row[len(first) : n]) for row, first, n in zip(summed, read, lengths, strict=True)]


def text_rows(text: Text, config: object, prompt: Tensor, reply: Tensor, num_codes: int) -> Tensor:
    """What the talker is fed beside its codes, [T + 2 + num_codes, E]: as engine/ar/talker/inputs.py."""
    end, pad = (text.embeddings[token] for token in (config.tts_text_end_token_id, config.tts_text_pad_token_id))
    ahead = [text.embeddings[READER][None], reply, end[None], pad.expand(max(0, num_codes - len(reply)), -1)]
    return torch.cat([prompt, torch.cat(ahead)[: num_codes + 2]])


def batch(
    text: Text, talker: Qwen2_5OmniTalkerForConditionalGeneration, data: list[Spoken], rng: random.Random
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(rows [B, L, E], codes [B, L], targets [B, L], words [B, L]); a prompt has the code IGNORED, which is none."""
    config = talker.config
    asked = [request(one.words, rng) for one in data]
    parts: list[list[Tensor]] = [[], [], [], []]
    for one, (prompt, reply) in zip(data, text.rows(asked, [answer(one.words) for one in data]), strict=True):
        before = torch.full((len(prompt) + 1,), IGNORED)
        codes = torch.tensor(one.codes)
        is_wrong = torch.rand(len(codes)) < WRONG_SHARE
        fed = torch.where(is_wrong, torch.randint(config.tts_codec_pad_token_id - 1, (len(codes),)), codes)
        begin = torch.tensor([config.tts_codec_pad_token_id, config.tts_codec_start_token_id])
        parts[0].append(text_rows(text, config, prompt, reply, len(codes)))
        parts[1].append(torch.cat([before[:-1], begin, fed]))
        parts[2].append(torch.cat([before, codes, torch.tensor([config.tts_codec_end_token_id])]))
        parts[3].append(torch.cat([before, torch.tensor(one.places())]))
    rows = nn.utils.rnn.pad_sequence(parts[0], batch_first=True)
    return rows, *(nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=IGNORED) for part in parts[1:])


class Reader(nn.Module):
    """The talker, and the question which word is being said."""

    def __init__(self, talker: Qwen2_5OmniTalkerForConditionalGeneration) -> None:
        super().__init__()
        self.talker = talker
        self.place = nn.Linear(TALKER_SIZE, NO_WORD + 1)
        self._middle = torch.empty(0)
        talker.model.layers[MIDDLE - 1].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self._middle = output

    def forward(self, rows: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """-> (logits of the next code [B, L, V], of the word [B, L, words])."""
        embeddings = self.talker.get_input_embeddings()(codes.clamp(min=0)) * (codes >= 0)[..., None]
        places = torch.arange(rows.shape[1]).expand(3, len(rows), -1)
        logits = self.talker(inputs_embeds=rows + embeddings, position_ids=places, use_cache=False).logits
        return logits, self.place(F.rms_norm(self._middle, (TALKER_SIZE,)))


def fresh_model(num_codes: int) -> Reader:
    talker = Qwen2_5OmniTalkerForConditionalGeneration(talker_config(num_codes))
    nn.init.normal_(talker.get_input_embeddings().weight)  # as large as the rows that join it
    return Reader(talker)


def learn(model: Reader, text: Text, data: list[Spoken], rng: random.Random) -> tuple[float, float, float]:
    """Adds the gradients of a batch; (loss of the codes, loss of the words, share of codes foretold)."""
    sums = torch.zeros(3)
    data = sorted(data, key=lambda one: len(one.codes))
    for start in range(0, len(data), len(data) // PARTS):
        part = data[start : start + len(data) // PARTS]
        rows, codes, targets, words = batch(text, model.talker, part, rng)
        with mixed_precision():
            logits, said = model(rows, codes)
        told, place = (
            F.cross_entropy(found.float().flatten(0, 1), meant.flatten(), ignore_index=IGNORED)
            for found, meant in ((logits, targets), (said, words))
        )
        share = len(part) / len(data)
        ((told + PLACE_WEIGHT * place) * share).backward()
        is_code = targets != IGNORED
        right = (logits.argmax(-1) == targets)[is_code].float().mean()
        sums += share * torch.stack([told.detach(), place.detach(), right])
    return tuple(sums.tolist())


@torch.no_grad()
def write(model: Reader, text: Text, asked: str, reply: str, max_codes: int = 300) -> list[int]:
    """The codes that it writes, the likeliest each time."""
    talker, config = model.talker, model.talker.config
    ((prompt, rows),) = text.rows([asked], [reply])
    fed = text_rows(text, config, prompt, rows, max_codes)[None]
    begin = torch.tensor([config.tts_codec_pad_token_id, config.tts_codec_start_token_id])
    inputs = fed[:, : len(prompt) + 2].clone()
    inputs[0, -2:] += talker.get_input_embeddings()(begin)
    cache, start, codes = DynamicCache(config=talker.model.config), 0, []
    while len(codes) < max_codes:
        stop = start + inputs.shape[1]
        places = torch.arange(start, stop).expand(3, 1, -1)
        logits = talker(inputs_embeds=inputs, position_ids=places, past_key_values=cache, use_cache=True).logits[0, -1]
        code = int(logits.argmax())
        if code >= config.tts_codec_pad_token_id:
            break
        codes.append(code)
        inputs = fed[:, stop : stop + 1] + talker.get_input_embeddings()(torch.tensor([[code]]))
        start = stop
    return codes


def likeness(model: Reader, text: Text, data: list[Spoken], seed: int) -> float:
    """How much of what is written is as the synthesiser says it: difflib's ratio, averaged."""
    rng = random.Random(seed)
    found = [(write(model, text, request(one.words, rng), answer(one.words)), one.codes) for one in data]
    return sum(difflib.SequenceMatcher(None, mine, list(codes), False).ratio() for mine, codes in found) / len(found)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    codebook = Codebook.load(args.codebook)
    thinker = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(args.thinker / "thinker", dtype=torch.float32)
    text = Text(thinker, PreTrainedTokenizerFast.from_pretrained(args.thinker / "tokenizer"))
    data = kept_sentences(args.folder / "sentences.json", args.sentences, codebook, args.seed)
    held_out = sentences(args.judged, codebook, args.seed, held_out=True)
    model = fresh_model(codebook.num_codes)
    optimizer = Optimizers(model, args.learning_rate, weight_decay=0.02, matrices=("talker.model.layers.",))
    trainer = Trainer(args.folder, args.steps, model, optimizer, decay=0.998)
    rng = random.Random(args.seed + 1 + trainer.run.step)
    while trainer.begin():
        told, place, right = learn(model, text, rng.sample(data, args.batch_size), rng)
        trainer.step(codes=told, words=place, right=right)
        if trainer.is_at(250):
            trainer.run.log(likeness=likeness(model, text, held_out[:4], trainer.run.step))
    trainer.finish()
    model.talker.save_pretrained(args.folder / "talker")
    trainer.run.log(final_likeness=likeness(model, text, held_out, 7))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/tiny-speech/talker"))
    parser.add_argument("--thinker", type=Path, default=Path("runs/tiny-speech/thinker"))
    parser.add_argument("--codebook", type=Path, default=Path("runs/tiny-speech/codebook.safetensors"))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--sentences", type=int, default=2500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--judged", type=int, default=24, help="held-out sentences in the final judgement")
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
