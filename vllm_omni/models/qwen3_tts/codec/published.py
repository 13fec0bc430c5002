"""Published folders that hold a codec's decoder: where its configuration stands, and how its tensors are named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_omni.errors import ConfigError
from vllm_omni.models.qwen3_tts.codec.config import CodecDecoderConfig
from vllm_omni.registry import names, resolve
from vllm_omni.utils.checks import brief, check_number
from vllm_omni.utils.files import read_json
from vllm_omni.worker.architecture import named_architectures

CONFIG = "config.json"
SAMPLE_RATE = 24_000  # where the config does not say it
MIN_RATE, MAX_RATE = 8_000, 192_000


@dataclass(frozen=True, slots=True)
class PublishedCodec:
    """Made by the functions of the registry's table "speech codec"."""

    folder: Path
    decoder: CodecDecoderConfig
    prefix: str  # of the decoder's tensors
    sample_rate: int  # Hz


def speech_tokenizer(folder: Path, raw: Mapping[str, Any], where: str) -> PublishedCodec:
    """The folder `speech_tokenizer` of a checkpoint."""
    config = CodecDecoderConfig.of_residual_codes(_section(raw, "decoder_config", where), f"{where}: decoder_config")
    rate, samples = raw.get("output_sample_rate", SAMPLE_RATE), raw.get("decode_upsample_rate", config.frame_samples)
    check_number(f"{where}: output_sample_rate", rate, MIN_RATE, MAX_RATE, integer=True, raises=ConfigError)
    if samples != config.frame_samples:
        raise ConfigError(
            f"{where}: decode_upsample_rate: got {brief(samples)}, expected {config.frame_samples}, the product of"
            " decoder_config's rates and ratios"
        )
    return PublishedCodec(folder, config, "decoder.", int(rate))


def code2wav(folder: Path, raw: Mapping[str, Any], where: str) -> PublishedCodec:
    """The part of that name of a folder that holds several models."""
    section = _section(raw, "code2wav_config", where)
    config = CodecDecoderConfig.of_summed_codes(section, f"{where}: code2wav_config")
    return PublishedCodec(folder, config, "code2wav.", SAMPLE_RATE)


def read_codec(folder: Path, part: str | None) -> PublishedCodec:
    """What a folder holds. part: which model of several; ConfigError for what is no codec."""
    where = str(folder / CONFIG)
    raw = read_json(folder / CONFIG)
    known = names("speech codec")
    found = [name if part is None else f"{name}.{part}" for name in named_architectures(raw, where)]
    row = next((name for name in found if name in known), None)
    if row is None:
        fix = "choose the folder speech_tokenizer of a checkpoint, or another 'part'"
        raise ConfigError(f"{where}: got {brief(found)}, expected one of {', '.join(known)}; {fix}")
    codec: PublishedCodec = resolve("speech codec", row)(folder, raw, where)
    return codec


def _section(raw: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    section = raw.get(key)
    if not isinstance(section, Mapping):
        raise ConfigError(f"{where}: {key}: got {brief(section)}, expected an object; is it another checkpoint?")
    return section
