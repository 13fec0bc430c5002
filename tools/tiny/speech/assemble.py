"""Puts the trained parts into one folder in the published format of Qwen2.5-Omni, all weights in bfloat16."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5OmniConfig,
    Qwen2_5OmniForConditionalGeneration,
    Qwen2_5OmniTalkerForConditionalGeneration,
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from tools.tiny.speech import token2wav
from tools.tiny.speech.shapes import ENDING, PADDING, READER, thinker_config

PROCESSOR = {  # as published: one file for images, videos and sounds
    "image_processor_type": "Qwen2VLImageProcessor",
    "feature_extractor_type": "WhisperFeatureExtractor",
    "processor_class": "Qwen2_5OmniProcessor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "min_pixels": 3136,
    "max_pixels": 200704,
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "chunk_length": 300,
    "feature_size": 128,
    "hop_length": 160,
    "n_fft": 400,
    "padding_side": "right",
    "padding_value": 0.0,
    "dither": 0.0,
    "return_attention_mask": True,
    "sampling_rate": 16000,
}
CARD = """# tiny-speech

A model that reads out one to five words it knows, in the format of Qwen2.5-Omni (24 kHz, one English voice, "Reader"),
trained from scratch for this package by `python -m tools.tiny.speech.train` on sentences that espeak-ng speaks. Asked
"read 3 7 red", it writes "three seven red" and says so. It neither looks nor listens: its encoders of pictures and
sounds have random weights. Apache-2.0.
"""


def assemble(runs: Path, folder: Path) -> None:
    """`runs` holds thinker/, talker/, dit/ and vocoder/ as the training scripts leave them."""
    shutil.rmtree(folder, ignore_errors=True)
    model = joined(runs)
    model.to(torch.bfloat16).save_pretrained(folder)
    voice = {name: tensor.clone() for name, tensor in token2wav.voice(runs).items()}
    torch.save({token2wav.SPEAKER: {"bos_token": READER, **voice}}, folder / "spk_dict.pt")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(runs / "thinker/tokenizer")
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": tokenizer.chat_template}, indent=2) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=2) + "\n")
    (folder / "README.md").write_text(CARD)


def joined(runs: Path) -> Qwen2_5OmniForConditionalGeneration:
    """The whole model, float32."""
    thinker = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(runs / "thinker/thinker", dtype=torch.float32)
    talker = Qwen2_5OmniTalkerForConditionalGeneration.from_pretrained(runs / "talker/talker", dtype=torch.float32)
    config = Qwen2_5OmniConfig(
        thinker_config=thinker_config(thinker.config.text_config.vocab_size).to_dict(),
        talker_config={**talker.config.to_dict(), "_name_or_path": ""},
        token2wav_config=token2wav.config(),
    )
    model = Qwen2_5OmniForConditionalGeneration(config)
    model.thinker.load_state_dict(thinker.state_dict())
    model.talker.load_state_dict(talker.state_dict())
    model.token2wav.load_state_dict(token2wav.trained(runs).state_dict())
    model.generation_config.update(eos_token_id=ENDING, pad_token_id=PADDING)
    return model
