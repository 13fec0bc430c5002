"""Trains the talker and its code predictor on the codes of all sentences.

As tools.tiny.speech.train_talker does, it feeds wrong codes now and then, and asks the middle of the network which word
is being said.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tools.tiny.common.muon import Optimizers
from tools.tiny.common.training import AveragedWeights, mixed_precision
from tools.tiny.talker.clock import Clock
from tools.tiny.talker.foretelling import first_logits, fresh_talker, layers, other_logits, rows_of
from tools.tiny.talker.lessons import END, Lessons, drawn
from tools.tiny.talker.publish import read_talker
from tools.tiny.talker.shapes import NUM_CODES
from tools.tiny.talker.spoken import NO_WORD, PADDING, Spoken
from vllm_omni.models.qwen3_tts.talker import Talker

WRONG_FRAMES, WRONG_CODES = 0.02, 0.02  # shares of what is fed
WORD_WEIGHT, OTHERS_WEIGHT = 0.3, 1.0
MIDDLE = 2  # layers before the question which word is being said
OTHERS_FRAMES = 4  # of a sentence, whose other codes are learnt
SAVE_EVERY_S, WEIGHT_DECAY = 120.0, 0.01


class Learner(nn.Module):
    """The talker, and the question which word is being said, which is not published."""

    def __init__(self, text_vocab_size: int) -> None:
        super().__init__()
        self.talker = fresh_talker(text_vocab_size)
        self.word = nn.Linear(self.talker.config.hidden_size, NO_WORD + 1)

    def forward(self, lessons: Lessons, codes: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """codes: [F, Q], of every frame -> (the loss, its parts)."""
        talker, end = self.talker, self.talker.config.codec.end
        fed = codes[wrong_frames(lessons.frames, len(codes)).clamp(min=0)]
        fed = fed.masked_fill((lessons.frames < 0)[..., None], PADDING)
        states, middle = layers(talker.decoder, rows_of(talker, lessons.text, lessons.marks, fed), keep=MIDDLE)
        is_frame = lessons.following >= 0
        meant = codes[lessons.following.clamp(min=0)]
        first = torch.where(is_frame, meant[..., 0], PADDING).masked_fill(lessons.following == END, end)
        logits = first_logits(talker, states).float()
        told = cross_entropy(logits, first)
        word = cross_entropy(self.word(F.rms_norm(middle, middle.shape[-1:])).float(), lessons.words)
        places = torch.multinomial(is_frame.flatten().float(), OTHERS_FRAMES * len(states), replacement=True)
        meant = meant.flatten(0, 1)[places]
        rest = other_logits(talker, states.flatten(0, 1)[places], wrong_codes(meant)).float()
        others = cross_entropy(rest, meant[:, 1:])
        right = (logits.argmax(-1) == first)[first >= 0].float().mean()
        parts = {"first": told, "others": others, "word": word, "right": right}
        parts["others_right"] = (rest.argmax(-1) == meant[:, 1:]).float().mean()
        return told + OTHERS_WEIGHT * others + WORD_WEIGHT * word, {name: one.detach() for name, one in parts.items()}


def cross_entropy(logits: Tensor, meant: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), meant.flatten(), ignore_index=PADDING)


def wrong_frames(frames: Tensor, num_frames: int) -> Tensor:
    is_wrong = (torch.rand(frames.shape, device=frames.device) < WRONG_FRAMES) & (frames >= 0)
    return torch.where(is_wrong, torch.randint_like(frames, num_frames), frames)


def wrong_codes(codes: Tensor) -> Tensor:
    is_wrong = torch.rand(codes.shape, device=codes.device) < WRONG_CODES
    return torch.where(is_wrong, torch.randint_like(codes, NUM_CODES), codes)


def begun(text_vocab_size: int, start: Path | None) -> Learner:
    """start: a file that `save` wrote or a folder that `publish` wrote; None: random weights."""
    learner = Learner(text_vocab_size)
    if start is None:
        return learner
    if start.is_dir():
        read_talker(learner.talker, start)
    else:
        learner.load_state_dict(load_file(start))
    return learner


def save(learner: Learner, weights: Mapping[str, Tensor], path: Path) -> None:
    """In float32. weights: averages of its parameters."""
    temporary = path.with_suffix(".tmp")
    save_file({name: one.contiguous() for name, one in (learner.state_dict() | weights).items()}, temporary)
    temporary.replace(path)


def train(
    learner: Learner, spoken: Spoken, codes: Tensor, clock: Clock, batch_size: int, rate: float, kept: Path
) -> Talker:
    """rate: the highest. kept: the file that holds the learner, now and then and in the end."""
    device = codes.device
    optimizer = Optimizers(learner, rate, WEIGHT_DECAY, matrices=("talker.decoder.",))
    average, saved = AveragedWeights(learner, 0.998), time.perf_counter()
    while clock.share < 1 or not clock.step:
        with mixed_precision(device):
            loss, parts = learner(drawn(spoken, batch_size).to(device), codes)
        loss.backward()
        nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.scale_learning_rate(clock.rate(1.0))
        optimizer.step()
        optimizer.zero_grad()
        average.update(learner, clock.step)
        clock.tick(loss=loss.detach(), **parts)
        if time.perf_counter() - saved > SAVE_EVERY_S:
            save(learner, average.weights, kept)
            saved = time.perf_counter()
    save(learner, average.weights, kept)
    learner.load_state_dict(average.weights, strict=False)
    return learner.talker
