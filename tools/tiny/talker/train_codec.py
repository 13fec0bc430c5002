"""Trains the codec: encoder, books and decoder together; then codes are written once for every frame, and the decoder
and the rows of the books go on alone with these.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tools.tiny.common.training import AveragedWeights
from tools.tiny.speech.spectra import exact_distance, spectra_distance
from tools.tiny.talker.clock import Clock
from tools.tiny.talker.coding import Books, Encoder
from tools.tiny.talker.decoding import coded, decode, fresh_decoder, latents
from tools.tiny.talker.lessons import spoken_frames
from tools.tiny.talker.sentences import drawn_words
from tools.tiny.talker.shapes import NUM_CODES, NUM_GROUPS
from tools.tiny.talker.spoken import SILENT, Spoken
from vllm_omni.models.qwen3_tts.codec.decoder import CodecDecoder

PIECE = 14  # frames
SENTENCES = 2000  # of which pieces are taken
HIGHEST_RATE = 1.2e-3
TOGETHER = 0.45  # of the time
EXACT_WEIGHT, BOOKS_WEIGHT = 3.0, 0.25
AROUND = 3  # silent frames on both sides of a word that is coded by itself
WORDS_AT_ONCE = 60


@dataclass(frozen=True, slots=True)
class Codec:
    """decoder: its codebooks' rows are not in it but here. rows: [Q, V, width]. codes: [F, Q], of every frame."""

    decoder: CodecDecoder
    rows: Tensor
    codes: Tensor

    def save(self, path: Path) -> None:
        """In float32."""
        decoder = {f"decoder.{name}": one.contiguous() for name, one in self.decoder.state_dict().items()}
        save_file({"rows": self.rows, "codes": self.codes, **decoder}, path)

    @classmethod
    def load(cls, path: Path, device: torch.device) -> Codec:
        found = load_file(path, str(device))
        rows, codes = found.pop("rows"), found.pop("codes")
        decoder = fresh_decoder().to(device)
        decoder.load_state_dict({name.removeprefix("decoder."): one for name, one in found.items()})
        return cls(decoder, rows, codes)


class Optimizer:
    """AdamW over some modules, and the average of the first's weights."""

    def __init__(self, clock: Clock, averaged: nn.Module, others: list[nn.Module], decay: float) -> None:
        self.clock, self.module = clock, averaged
        self.parameters = [
            parameter for module in (averaged, *others) for parameter in module.parameters() if parameter.requires_grad
        ]
        self.inner = torch.optim.AdamW(self.parameters, 1e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
        self.average = AveragedWeights(averaged, decay)

    def step(self, loss: Tensor, highest_rate: float) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.inner.param_groups:
            group["lr"] = self.clock.rate(highest_rate)
        self.inner.step()
        self.inner.zero_grad()
        self.average.update(self.module, self.clock.step)


class Tape:
    """Frames of many sentences, one behind the other."""

    def __init__(self, spoken: Spoken, device: torch.device) -> None:
        frames, _ = spoken_frames(spoken, drawn_words(spoken.known, SENTENCES))
        self.frames = frames[frames >= 0].to(device)

    def pieces(self, size: int) -> Tensor:
        """[size, PIECE] frames."""
        device = self.frames.device
        starts = torch.randint(len(self.frames) - PIECE, (size, 1), device=device)
        return self.frames[starts + torch.arange(PIECE, device=device)]


class Coded(nn.Module):
    """The decoder, and rows that are trained with it."""

    def __init__(self, decoder: CodecDecoder, rows: Tensor) -> None:
        super().__init__()
        self.decoder, self.rows = decoder, nn.Parameter(rows.clone())


def train(spoken: Spoken, clock: Clock, batch_size: int, device: torch.device) -> Codec:
    samples = spoken.samples.to(device)
    tape = Tape(spoken, device)
    decoder, encoder, books = fresh_decoder().to(device), Encoder().to(device), Books().to(device)
    for part in (decoder.codebooks.rows, decoder.codebooks.usage):
        part.requires_grad_(False)
    optimizer = Optimizer(clock, decoder, [encoder, books], 0.999)
    while clock.share < TOGETHER or not clock.step:
        sound = samples[tape.pieces(batch_size)].flatten(1)
        first, rest, off = books(encoder(sound))
        loss, parts = distance(decode(decoder, latents(decoder, first, rest)), sound)
        optimizer.step(loss + BOOKS_WEIGHT * off, HIGHEST_RATE)
        clock.tick(loss=loss.detach(), off=off.detach(), **parts)
    codes = written(spoken, samples, encoder, books)
    used = [len(book.unique()) for book in codes.T]
    print(f"codes used of each book: {used}; frames with codes of their own: {len(codes.unique(dim=0))}/{len(codes)}")
    return _alone(Coded(decoder, books.rows), codes, samples, tape, clock, batch_size)


def _alone(model: Coded, codes: Tensor, samples: Tensor, tape: Tape, clock: Clock, batch_size: int) -> Codec:
    """The decoder and its rows, with codes that no longer change."""
    optimizer, decoder, begun = Optimizer(clock, model, [], 0.999), model.decoder, clock.step
    while clock.share < 1 or clock.step == begun:
        frames = tape.pieces(batch_size)
        loss, parts = distance(decode(decoder, coded(decoder, model.rows, codes[frames])), samples[frames].flatten(1))
        optimizer.step(loss, HIGHEST_RATE)
        clock.tick(loss=loss.detach(), **parts)
    model.load_state_dict(optimizer.average.weights, strict=False)
    return Codec(decoder, model.rows.detach(), codes)


def distance(decoded: Tensor, sound: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """(the loss, its parts)."""
    spectra, exact = spectra_distance(decoded, sound), exact_distance(decoded, sound)
    return spectra + EXACT_WEIGHT * exact, {"spectra": spectra.detach(), "exact": exact.detach()}


@torch.no_grad()
def written(spoken: Spoken, samples: Tensor, encoder: Encoder, books: Books) -> Tensor:
    """The codes of every frame, [F, Q], by books that are fitted to all frames. Silence has the code zero of each."""
    places = spoken.places.flatten(0, 2).to(samples.device)
    places = places[places[:, 1] > 0]
    around = torch.arange(-AROUND, int(places[:, 1].max()) + AROUND, device=samples.device)
    inside = (around >= 0) & (around < places[:, 1:])
    frames = torch.where(inside, places[:, :1] + around, SILENT)
    latent = torch.cat([encoder(samples[part].flatten(1)) for part in frames.split(WORDS_AT_ONCE)])
    found = samples.new_zeros(len(samples), latent.shape[2])
    found[frames[inside]] = latent[inside]
    is_loud = found.abs().amax(1) > 0
    books.refit(found[is_loud])
    codes = books.codes(found)
    assert codes.shape == (len(samples), NUM_GROUPS) and int(codes.max()) < NUM_CODES
    return codes.masked_fill(~is_loud[:, None], 0)
