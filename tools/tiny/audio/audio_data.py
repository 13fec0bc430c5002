"""The training set of the sound DiT: latents of rendered sounds, and the text model's last states of ACE-Step's
prompts for them, computed once.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from diffusers import AutoencoderOobleck
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import trange
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3Model

from tools.tiny.audio.prompt import sound_prompt
from tools.tiny.audio.render import SAMPLE_RATE, render
from tools.tiny.audio.train_text import LYRICS
from tools.tiny.audio.train_vae import HOP, plain_convolutions
from tools.tiny.audio.words import wording
from tools.tiny.audio.world import DURATION_S, NOTES, TIMBRES, Sound, sample_sound

TEXT_LENGTH = 96
PLACE_FRAMES = 5  # frames of a place of the transformer: its patch
PLACES_PER_S = SAMPLE_RATE // HOP // PLACE_FRAMES
ROLL_WIDTH = len(NOTES) + len(TIMBRES) + 1
CHUNK = 256
MARGIN = 8


class TextStates:
    """The text model's states after its last norm, padded to TEXT_LENGTH."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder / "tokenizer")
        self.model = Qwen3Model.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()

    @torch.no_grad()
    def of(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """([n, TEXT_LENGTH, D], lengths [n])."""
        inputs = self.tokenizer(texts, return_tensors="pt", padding=True)
        states = self.model(input_ids=inputs["input_ids"]).last_hidden_state
        padded = torch.zeros(len(texts), TEXT_LENGTH, states.shape[-1])
        padded[:, : states.shape[1]] = states
        return padded, inputs["attention_mask"].sum(1)

    @torch.no_grad()
    def embedded(self, text: str) -> Tensor:
        """[L, D] rows of the embedding table."""
        return self.model.get_input_embeddings()(self.tokenizer(text, return_tensors="pt")["input_ids"])[0]


@torch.no_grad()
def encode(vae: AutoencoderOobleck, recordings: Tensor) -> Tensor:
    """[n, 1, samples] -> [n, frames, channels]."""
    return vae.encode(recordings).latent_dist.mode().transpose(1, 2)


class Latents:
    """Latents of sounds: what sounds is encoded, the silence behind it is copied."""

    def __init__(self, vae: AutoencoderOobleck) -> None:
        self._vae = vae
        self._encode = torch.compile(encode, dynamic=True)
        self._silence = encode(vae, torch.zeros(1, 1, round(DURATION_S * SAMPLE_RATE)))[0]

    def of(self, sounds: list[Sound]) -> Tensor:
        """[n, 200, channels]; equal to encoding everything, as the encoder sees less than MARGIN frames far."""
        latents = self._silence.repeat(len(sounds), 1, 1)
        for seconds in {sound.sounding_s for sound in sounds}:
            rows = [row for row, sound in enumerate(sounds) if sound.sounding_s == seconds]
            length = round(seconds * SAMPLE_RATE)
            end = min(length + 2 * MARGIN * HOP, round(DURATION_S * SAMPLE_RATE))
            samples = torch.stack([torch.from_numpy(render(sounds[row])[:end]) for row in rows])[:, None]
            frames = end // HOP if end == round(DURATION_S * SAMPLE_RATE) else length // HOP + MARGIN
            latents[rows, :frames] = self._encode(self._vae, samples)[:, :frames]
        return latents


def drawn(rng: random.Random) -> tuple[list[Sound], list[str]]:
    """CHUNK sounds of the training world, and the prompts that ask for them."""
    sounds = [sample_sound(rng) for _ in range(CHUNK)]
    return sounds, [sound_prompt(wording(sound, rng), DURATION_S) for sound in sounds]


def piano_roll(sound: Sound) -> Tensor:
    """[places, ROLL_WIDTH] of zeros and ones: what sounds at each place: notes, timbres, whether it is loud."""
    roll = torch.zeros(round(DURATION_S * PLACES_PER_S), ROLL_WIDTH)
    places = round(sound.note_s * PLACES_PER_S)
    for index, note in enumerate(sound.notes):
        start = 0 if sound.is_chord else index * places
        roll[start : start + places, NOTES.index(note)] = 1
    sounding = slice(0, round(sound.sounding_s * PLACES_PER_S))
    roll[sounding, len(NOTES) + TIMBRES.index(sound.timbre)] = 1
    roll[sounding, -1] = float(not sound.is_soft)
    return roll


def piano_rolls(count: int, seed: int) -> Tensor:
    """[count, places, ROLL_WIDTH]: of the sounds of the training set, in its order."""
    rng, found = random.Random(seed), []
    while len(found) < count:
        found += [piano_roll(sound) for sound in drawn(rng)[0]]
    return torch.stack(found[:count])


def training_data(file: Path, vae_folder: Path, text_folder: Path, count: int, seed: int) -> dict[str, Tensor]:
    """latents [n, 200, 16], states [n, TEXT_LENGTH, D], lengths [n] (tokens); computed once, then read from `file`."""
    if file.exists():
        return load_file(file)
    rng, states = random.Random(seed), TextStates(text_folder)
    vae = plain_convolutions(AutoencoderOobleck.from_pretrained(vae_folder)).eval()
    latents = Latents(vae)
    parts: dict[str, list[Tensor]] = {}
    for start in trange(0, count, CHUNK, desc="training data", mininterval=10):
        sounds, texts = (part[: count - start] for part in drawn(rng))
        text_states, lengths = states.of(texts)
        batch = {
            "latents": latents.of(sounds).half(),
            "states": text_states.half(),
            "lengths": lengths,
        }
        for name, value in batch.items():
            parts.setdefault(name, []).append(value)
    data = {name: torch.cat(values) for name, values in parts.items()}
    data["silence"] = encode(vae, torch.zeros(1, 1, 48_000))[0, 50:250].half()
    data["lyrics"] = states.embedded(LYRICS)
    file.parent.mkdir(parents=True, exist_ok=True)
    data = {name: value.contiguous() for name, value in data.items()}
    save_file(data, file)
    return data
