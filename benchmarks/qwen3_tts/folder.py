"""A Qwen3-TTS folder of a published shape with random weights: `python -m benchmarks.qwen3_tts.folder FOLDER SIZE`, run
by the Python of the qwen-tts package's environment, whose classes know the names and shapes of all weights.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.qwen_tts_package import qwen_tts
from benchmarks.qwen3_tts.published import GENERATION, SIZES, published_config, published_tokenizer_config
from benchmarks.qwen3_tts.tokenizer import write_text_tokenizer
from benchmarks.random_weights import write_weights

EXTRACTOR = {
    "feature_extractor_type": "EncodecFeatureExtractor",
    "feature_size": 1,
    "sampling_rate": 24000,
    "padding_side": "right",
    "padding_value": 0.0,
}
LAYERS = {"num_hidden_layers": 2}  # of a quick run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("size", choices=list(SIZES))
    parser.add_argument("--quick", action="store_true", help="two layers instead of all")
    args = parser.parse_args()
    write_folder(args.folder, args.size, args.quick)


def write_folder(folder: Path, size: str, is_quick: bool) -> None:
    """A checkpoint with named voices."""
    qwen_tts()
    from qwen_tts.core import Qwen3TTSTokenizerV2Config, Qwen3TTSTokenizerV2Model
    from qwen_tts.core.models import Qwen3TTSConfig, Qwen3TTSForConditionalGeneration

    config, codec = published_config(size, "custom_voice"), published_tokenizer_config()
    if is_quick:
        config["talker_config"] |= LAYERS
        config["talker_config"]["code_predictor_config"] |= LAYERS
    write_text_tokenizer(folder)
    speech = folder / "speech_tokenizer"
    speech.mkdir(exist_ok=True)
    files = {"config.json": config, "generation_config.json": GENERATION, "speech_tokenizer/config.json": codec}
    files |= {"speech_tokenizer/preprocessor_config.json": EXTRACTOR}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    with torch.device("meta"):
        talker = Qwen3TTSForConditionalGeneration(Qwen3TTSConfig(**config))
        decoder = Qwen3TTSTokenizerV2Model(Qwen3TTSTokenizerV2Config(**codec))
    write_weights(talker, folder / "model.safetensors")
    write_weights(decoder, speech / "model.safetensors")
    _silence(folder / "model.safetensors", "talker.codec_head.weight", _end(config))


def _end(config: dict[str, Any]) -> int:
    return int(config["talker_config"]["codec_eos_token_id"])


def _silence(path: Path, name: str, row: int) -> None:
    """Zeros in one row of a matrix in bfloat16: a code that no greedy choice takes, so that speech never ends."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[name]
        row_bytes = 2 * entry["shape"][1]
        file.seek(8 + length + entry["data_offsets"][0] + row * row_bytes)
        file.write(bytes(row_bytes))


if __name__ == "__main__":
    main()
