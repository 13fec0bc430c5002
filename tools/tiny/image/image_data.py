"""The training set of the image DiT: latents of drawings, and the text model's states of their words, computed once.

Each scene has two texts: the canonical words as a prompt (what `tiny_image.yaml` encodes), and the same words as the
text model's own answer to a loose request (what `tiny_scene.yaml` passes on).
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import trange
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3ForCausalLM

from tools.tiny.common.training import mixed_precision
from tools.tiny.image.loose import is_held_out, loose
from tools.tiny.image.render import draw_scene
from tools.tiny.image.world import Scene, canonical, sample_scene

TEXT_LENGTH = 32
LAYER = -2


def scene_and_request(rng: random.Random) -> tuple[Scene, str]:
    """A scene of the training world and one loose request for it that is not held out."""
    while True:
        scene = sample_scene(rng)
        request = loose(scene, rng)
        if not is_held_out(request):
            return scene, request


class TextStates:
    """The text model's states of layer -2, padded to TEXT_LENGTH."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder / "tokenizer")
        self.model = Qwen3ForCausalLM.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()

    def prompts(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """([n, TEXT_LENGTH, D], lengths [n]) of the texts as chat prompts, template included."""
        chats = [[{"role": "user", "content": text}] for text in texts]
        rendered = self.tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        return self._states(rendered, [0] * len(texts))

    def answers(self, requests: list[str], answers: list[str]) -> tuple[Tensor, Tensor]:
        """The same for the tokens of the answers alone, in the context of their requests."""
        chats = [[{"role": "user", "content": request}] for request in requests]
        rendered = self.tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        starts = [len(ids) for ids in self.tokenizer(rendered)["input_ids"]]
        return self._states([a + b for a, b in zip(rendered, answers, strict=True)], starts)

    @torch.no_grad()
    def _states(self, texts: list[str], starts: list[int]) -> tuple[Tensor, Tensor]:
        inputs = self.tokenizer(texts, return_tensors="pt", padding=True)
        hidden = self.model.model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], output_hidden_states=True
        ).hidden_states[LAYER]
        padded = torch.zeros(len(texts), TEXT_LENGTH, hidden.shape[-1])
        lengths = inputs["attention_mask"].sum(1) - torch.tensor(starts)
        for row, (start, length) in enumerate(zip(starts, lengths.tolist(), strict=True)):
            padded[row, :length] = hidden[row, start : start + length]
        return padded, lengths


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, drawings: list[np.ndarray]) -> Tensor:
    """[n, 16, 16, 16] normalised latents."""
    images = torch.from_numpy(np.stack(drawings)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with mixed_precision():
        latents = vae.encode(images.contiguous(memory_format=torch.channels_last)).latent_dist.mode().float()
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def training_data(file: Path, vae_folder: Path, text_folder: Path, count: int, seed: int) -> dict[str, Tensor]:
    """latents [n, ...], and for both texts states [n, 32, D] and lengths [n]; computed once, then read from `file`."""
    if file.exists():
        return load_file(file)
    rng, states = random.Random(seed), TextStates(text_folder)
    vae = AutoencoderKL.from_pretrained(vae_folder, low_cpu_mem_usage=False).to(memory_format=torch.channels_last)
    parts: dict[str, list[Tensor]] = {}
    for _ in trange(count // 64, desc="training data", mininterval=10):
        scenes, requests = zip(*(scene_and_request(rng) for _ in range(64)), strict=True)
        words = [canonical(scene) for scene in scenes]
        prompt_states, prompt_lengths = states.prompts(words)
        answer_states, answer_lengths = states.answers(list(requests), words)
        batch = {
            "latents": encode_pictures(vae, [draw_scene(scene, rng) for scene in scenes]).half(),
            "prompt_states": prompt_states.half(),
            "prompt_lengths": prompt_lengths,
            "answer_states": answer_states.half(),
            "answer_lengths": answer_lengths,
        }
        for name, value in batch.items():
            parts.setdefault(name, []).append(value)
    data = {name: torch.cat(values).contiguous() for name, values in parts.items()}
    empty_states, empty_lengths = states.prompts([""])
    data |= {"empty_states": empty_states.half(), "empty_lengths": empty_lengths}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(data, file)
    return data
