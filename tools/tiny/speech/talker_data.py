"""Sentences of the training set as codes, computed once and kept as JSON, and which word each code belongs to."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch

from tools.tiny.speech.codes import Codebook
from tools.tiny.speech.mel import log_mel
from tools.tiny.speech.synthesise import speak
from tools.tiny.speech.world import WORDS, Sentence, sentence

SILENT_CODE = 0
PAUSE_CODES = 5  # so many silent codes in a row are a pause between words
NO_WORD = len(WORDS)


@dataclass(frozen=True, slots=True)
class Spoken:
    words: Sentence
    codes: tuple[int, ...]

    def places(self) -> list[int]:
        """Of every code, and of the end after them, the word that is being said or comes next (its index in WORDS);
        NO_WORD after the last.
        """
        starts = pause_starts(self.codes)
        found, number = [], 0
        for index in range(len(self.codes) + 1):
            number += index in starts
            found.append(WORDS.index(self.words[number]) if number < len(self.words) else NO_WORD)
        return found


def pause_starts(codes: tuple[int, ...]) -> set[int]:
    """Where pauses after words begin."""
    found, run, has_spoken = set(), 0, False
    for index, code in enumerate(codes):
        run = run + 1 if code == SILENT_CODE else 0
        has_spoken |= code != SILENT_CODE
        if run == PAUSE_CODES and has_spoken:
            found.add(index - PAUSE_CODES + 1)
    return found


def spoken(words: Sentence, codebook: Codebook) -> Spoken:
    return Spoken(words, tuple(codebook.encode(log_mel(torch.from_numpy(speak(words)))).tolist()))


def sentences(count: int, codebook: Codebook, seed: int, *, held_out: bool = False) -> list[Spoken]:
    """Random sentences with their codes."""
    rng = random.Random(f"{seed} {held_out}")
    return [spoken(sentence(rng, held_out=held_out), codebook) for _ in range(count)]


def kept_sentences(path: Path, count: int, codebook: Codebook, seed: int) -> list[Spoken]:
    """The run's training set, made when it starts."""
    if not path.exists():
        made = sentences(count, codebook, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([[one.words, one.codes] for one in made]))
    return [Spoken(tuple(words), tuple(codes)) for words, codes in json.loads(path.read_text())]
