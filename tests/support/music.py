"""What tests of music requests share: the configuration files of an ACE-Step folder, sounds and audio codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from vllm_omni import Audio

RATE, HOP, POOL = 16_000, 640, 4


def save_folder(folder: Path, vae: dict[str, Any] | None = None, pool: int | None = POOL) -> Path:
    """The configuration files of an ACE-Step folder: stereo, 16 kHz, 25 latent frames a second, 4 of them a code."""
    config = {"sampling_rate": RATE, "audio_channels": 2, "downsampling_ratios": [4, 4, 5, 8], **(vae or {})}
    files: dict[str, Any] = {"model_index.json": {"_class_name": "AceStepPipeline"}, "vae/config.json": config}
    if pool is not None:
        files["audio_token_detokenizer/config.json"] = {"pool_window_size": pool}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


def sound(seconds: float = 2.0, rate: int = RATE, channels: int = 2) -> Audio:
    """Another tone in every channel."""
    times = np.arange(round(rate * seconds)) / rate
    return Audio(np.stack([0.3 * np.sin(600 * (k + 1) * times) for k in range(channels)]).astype(np.float32), rate)


def codes(count: int) -> str:
    return "".join(f"<|audio_code_{7 * index}|>" for index in range(count))
