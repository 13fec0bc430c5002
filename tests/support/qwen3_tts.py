"""Tiny Qwen3-TTS folders whose weights are a formula of their names, and what the qwen-tts package answered for them.

The answers lie in tests/models/qwen3_tts/data; tools/qwen_tts_reference.py made them, in an environment of its own, and
writes its folders with this module, too: so numpy, safetensors and tokenizers are all that it imports.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from support.qwen3_tts_configs import tiny_config, tiny_tokenizer_config

from benchmarks.qwen3_tts.published import GENERATION
from benchmarks.qwen3_tts.tokenizer import vocabulary_and_merges, write_text_tokenizer

Floats = npt.NDArray[np.float32]
Layout = Mapping[str, list[int]]  # shape by name

DATA = Path(__file__).parents[1] / "models" / "qwen3_tts" / "data"
SAMPLE_RATE = 24000


@dataclass(frozen=True)
class Case:
    """One request of data/cases.json; its arrays are named NAME.ARRAY in the answers."""

    name: str
    task: str  # custom_voice, voice_design or base: the checkpoint
    text: str
    language: str  # "auto" or a name
    streams_text: bool  # the package's non_streaming_mode, the other way round
    speaker: str | None = None
    instruct: str | None = None
    sound_s: float | None = None  # seconds of `sound` that are cloned
    ref_text: str | None = None  # None with a sound: the speaker's embedding alone


def cases() -> dict[str, Case]:
    return {case["name"]: Case(**case) for case in json.loads((DATA / "cases.json").read_text(encoding="utf-8"))}


def answers() -> dict[str, npt.NDArray[Any]]:
    """NAME.input_ids [n], .ref_ids [n], .instruct_ids [n]: what the package's tokenizer made, with the chat's marks.
    NAME.prompt [T, D]: the talker's input; .trailing [n, D]: text rows of the steps after, tts_pad past their end.
    NAME.codes [frames, 16]: greedy, all codebooks. NAME.logits [frames, CODES + 110]: codebook 0, before any rule.
    NAME.residual_logits [2, 15, CODES], of the first frames. NAME.waveform [frames * 192].

    A case with fewer than 8 frames came to its end (one more row of logits); the others were cut there. Of `base` also
    NAME.embedding [D] of the cloned sound and, in context, its NAME.ref_codes [n, 16].
    codec.codes [n, 16] and codec.waveform [n * 192]; encoder.SECONDS.codes [n, 16] of `sound(SECONDS)`.
    """
    return load_file(DATA / "answers.safetensors")


def made_by() -> dict[str, str]:
    """Versions of the packages that gave the answers."""
    with safe_open(DATA / "answers.safetensors", "numpy") as file:
        return dict(file.metadata())


def write_folder(folder: Path, task: str) -> Path:
    """A tiny checkpoint as published: two safetensors files, configs, a tokenizer without tokenizer.json."""
    layouts = json.loads((DATA / "layouts.json").read_text(encoding="utf-8"))
    write_text_tokenizer(folder)
    _write_json(folder / "config.json", config(task))
    _write_json(folder / "generation_config.json", GENERATION)
    write_weights(folder / "model.safetensors", layouts[task])
    write_speech_tokenizer(folder / "speech_tokenizer")
    return folder


def write_speech_tokenizer(folder: Path) -> Path:
    """The part that turns codes into sound and sound into codes, alone."""
    layouts = json.loads((DATA / "layouts.json").read_text(encoding="utf-8"))
    _write_json(folder / "config.json", tiny_tokenizer_config())
    extractor = {"feature_extractor_type": "EncodecFeatureExtractor", "feature_size": 1, "sampling_rate": SAMPLE_RATE}
    _write_json(folder / "preprocessor_config.json", extractor | {"padding_side": "right", "padding_value": 0.0})
    write_weights(folder / "model.safetensors", layouts["speech_tokenizer"])
    return folder


def config(task: str) -> dict[str, Any]:
    names = ("im_start", "im_end", "tts_pad", "tts_bos", "tts_eos")
    first = len(vocabulary_and_merges()[0]) + 1
    tokens = {f"{name}_token_id": first + place for place, name in enumerate(names)}
    return tiny_config(task, tokens, text_vocab_size=first + len(names))


def write_weights(file: Path, layout: Layout) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: weight(name, shape) for name, shape in layout.items()}, file, {"format": "pt"})


def weight(name: str, shape: list[int]) -> Floats:
    """Wide enough that every part of a model shows in its answer; each kind within what training leaves."""
    numbers = spread(name, shape)
    if name.endswith("initialized"):
        return np.ones(shape, np.float32)
    if name.endswith("cluster_usage"):
        return 1.5 + 0.5 * numbers  # a count: positive
    if name.endswith(("gamma", "_layer_scale.scale")):
        return 0.5 + 0.2 * numbers
    if name.endswith(("alpha", "beta")):
        return 0.3 * numbers  # logarithms
    if len(shape) == 1:
        return 1 + 0.2 * numbers if "norm" in name and name.endswith("weight") else 0.1 * numbers
    if "embed" in name:
        return math.sqrt(3) * numbers
    gain = 3.0 if "head" in name else 0.68 if name.startswith("decoder.decoder") else 1.0  # clear choices; no clipping
    return np.float32(gain * math.sqrt(3 / math.prod(shape[1:]))) * numbers


def spread(name: str, shape: list[int]) -> Floats:
    """In [-1, 1). The stream of PCG64 is promised to stay, unlike those of numpy's and torch's distributions."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    raw = np.random.PCG64(seed).random_raw(math.prod(shape))
    return ((raw >> np.uint64(40)).astype(np.float32) / 2**23 - 1).reshape(shape)


def sound(seconds: float) -> Floats:
    """[n], a voice of sorts: harmonics that glide, a beat, a little noise."""
    time_s = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    phase = 2 * np.pi * (140 * time_s + 30 * time_s**2)
    voice = sum(np.sin(k * phase) / k for k in range(1, 12))
    beat = 0.6 + 0.4 * np.sin(2 * np.pi * 4 * time_s)
    return (0.2 * voice * beat).astype(np.float32) + 0.02 * spread("noise", [len(time_s)])


def codes(frames: int) -> npt.NDArray[np.int64]:
    """[frames, 16]"""
    return ((spread("codes", [frames, 16]) + 1) * 32).astype(np.int64)


def _write_json(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")
