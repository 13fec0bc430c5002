"""What the talker is fed and what it is to write, for many sentences at once, in both layouts of the prompt.

Legend: S sentences, L positions, n text tokens, T frames.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.tiny.speech.world import MAX_WORDS
from tools.tiny.talker.foretelling import talker_config
from tools.tiny.talker.sentences import Sentences, compact
from tools.tiny.talker.shapes import LANGUAGE, SPEAKER
from tools.tiny.talker.spoken import GAP, LEAD, NO_WORD, PADDING, SILENT, TAIL, Spoken
from vllm_omni.models.qwen3_tts.prompt import Script, lay_out

BESIDE, NAMED = 0.15, 0.15  # shares of sentences with text beside the frames, and with a language that is named
END = -2  # in the place of a frame that follows
LONGEST = 160  # positions
WORD = 1 << 20  # in a template, the first text token of the words stands as this number, the next as the one behind


@dataclass(frozen=True, slots=True)
class Lessons:
    """All int64 [S, L], PADDING where there is nothing."""

    text: Tensor  # text token of a position
    marks: Tensor  # mark of the first codebook, of a prompt
    frames: Tensor  # frame that is fed
    following: Tensor  # frame that is to be written after it, or END
    words: Tensor  # word that is being said by that

    def to(self, device: torch.device) -> Lessons:
        return Lessons(*(getattr(self, name).to(device) for name in self.__slots__))


def drawn(spoken: Spoken, size: int) -> Lessons:
    """Of sentences that are drawn anew."""
    return lessons(spoken, Sentences.drawn(spoken, size), torch.rand(size) < NAMED, torch.rand(size) >= BESIDE)


def lessons(spoken: Spoken, sentences: Sentences, is_named: Tensor, is_whole: Tensor) -> Lessons:
    """Up to the position that writes the end."""
    frames, said = spoken_frames(spoken, sentences.words)
    counts, num_tokens = (frames >= 0).sum(1), (sentences.tokens >= 0).sum(1)
    role, vocab_size = tuple(spoken.role.tolist()), spoken.vocab_size
    keys = list(zip(num_tokens.tolist(), is_named.tolist(), is_whole.tolist(), strict=True))
    templates = [template(role, vocab_size, *key) for key in keys]
    text, marks = (torch.stack([getattr(one, name) for one in templates]) for name in ("text", "marks"))
    begins = torch.tensor([one.begins for one in templates])
    places = torch.arange(int((begins + counts).max()))
    text, marks = text[:, : len(places)], marks[:, : len(places)]
    own = sentences.tokens.gather(1, (text - WORD).clamp(0, sentences.tokens.shape[1] - 1))
    text = torch.where(text >= WORD, own, text).masked_fill(places >= (begins + counts)[:, None], PADDING)
    ahead = places - begins[:, None] + 1  # the frame that follows a position
    following = at(frames, ahead).masked_fill(ahead == counts[:, None], END)
    return Lessons(text, marks, at(frames, ahead - 1), following, at(said, ahead))


def at(rows: Tensor, places: Tensor) -> Tensor:
    """Values of rows at places, PADDING where these lie outside."""
    inside = (places >= 0) & (places < rows.shape[1])
    return rows.gather(1, places.clamp(0, rows.shape[1] - 1)).masked_fill(~inside, PADDING)


def spoken_frames(spoken: Spoken, words: Tensor) -> tuple[Tensor, Tensor]:
    """words: [S, MAX_WORDS] -> (frames [S, T], the word that is said by each, a pause belonging to the next)."""
    is_word = words >= 0
    lengths = is_word.sum(1)
    places = spoken.places[words.clamp(min=0), lengths[:, None], torch.arange(MAX_WORDS)]
    first, count = places.unbind(-1)
    steps = torch.arange(int(count.max()))
    own = torch.where(steps < count[..., None], first[..., None] + steps, PADDING)
    pause = torch.full((*words.shape, max(LEAD, GAP)), SILENT)
    pause[:, 0, LEAD:] = pause[:, 1:, GAP:] = PADDING
    frames = torch.cat([pause, own], 2).masked_fill(~is_word[..., None], PADDING)
    said = torch.where(frames >= 0, words[..., None], PADDING)
    tail = torch.full((len(words), TAIL), SILENT)
    frames = torch.cat([frames.flatten(1), tail], 1)
    return compact(frames), compact(torch.cat([said.flatten(1), torch.full_like(tail, NO_WORD)], 1))


@dataclass(frozen=True, slots=True)
class Template:
    """A prompt and what stands beside the frames, of any words of so many tokens."""

    text: Tensor  # [L], as in Lessons, with WORD and what follows it for the words
    marks: Tensor  # [L]
    begins: int  # the position that is fed the first frame


@functools.cache
def template(role: tuple[int, ...], vocab_size: int, num_tokens: int, is_named: bool, is_whole: bool) -> Template:
    config = talker_config(vocab_size)
    script = Script(
        role=role,
        words=range(WORD, WORD + num_tokens),
        language=config.languages[LANGUAGE] if is_named else None,
        speaker=config.speakers[SPEAKER],
        is_whole=is_whole,
    )
    layout = lay_out(script, config)
    text = [PADDING if row.text is None else row.text for row in layout.rows]
    marks = [PADDING if row.code is None else row.code for row in layout.rows]
    text, marks = torch.tensor([*text, *layout.trailing]), torch.tensor(marks)
    padded = [F.pad(one, (0, LONGEST - len(one)), value=by) for one, by in ((text, config.text.pad), (marks, PADDING))]
    return Template(*padded, len(layout.rows))
