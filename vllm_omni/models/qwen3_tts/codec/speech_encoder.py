"""Reference audio to codes: the encoder half of the speech tokenizer, which is Mimi's (arXiv 2410.00037), as
transformers computes it.

In float32 whatever the talker computes in: a code is the nearest of many rows, and rounding would choose others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vllm_omni.errors import CheckpointError, ConfigError
from vllm_omni.layers.weights import Target, load_weights, weights_bytes
from vllm_omni.models.qwen3_tts.codec.config import MAX_SIZE
from vllm_omni.models.qwen3_tts.codec.published import SAMPLE_RATE
from vllm_omni.utils.checks import brief, check_number
from vllm_omni.utils.files import read_json

PREFIX = "encoder."
# The published package attends to all of a reference, whatever its config's window says; newer transformers would not.
# Up to ten seconds of the published models it is the same.
NO_WINDOW = {"sliding_window": 2**20}
DECODING_PARTS = ("decoder", "decoder_transformer", "upsample")


class SpeechEncoder:
    """Made by `load`. Not for several threads at once."""

    def __init__(self, model: Any, frame_samples: int, num_codes: int) -> None:
        self._model = model
        self.frame_samples, self.num_codes = frame_samples, num_codes

    @classmethod
    def load(cls, folder: Path, device: torch.device, variant: str | None = None) -> SpeechEncoder:
        """folder: `speech_tokenizer` of a checkpoint. CheckpointError where tensors are missing or misshapen."""
        where = str(folder / "config.json")
        raw = read_json(folder / "config.json")
        counts = [raw.get("encode_downsample_rate", 1920), raw.get("encoder_valid_num_quantizers", 16)]
        for name, count in zip(("encode_downsample_rate", "encoder_valid_num_quantizers"), counts, strict=True):
            check_number(f"{where}: {name}", count, 1, MAX_SIZE, integer=True, raises=ConfigError)
        rate = raw.get("input_sample_rate", SAMPLE_RATE)
        if rate != SAMPLE_RATE:
            raise ConfigError(f"{where}: input_sample_rate: got {brief(rate)}, expected {SAMPLE_RATE}")
        model = _empty_model(raw.get("encoder_config"), f"{where}: encoder_config")
        load_weights(_Published(model), folder, PREFIX, variant)
        return cls(model.to(device), *counts)

    @staticmethod
    def weights_bytes(folder: Path, variant: str | None = None) -> int:
        """Once loaded, from the headers."""
        return weights_bytes(folder, torch.float32.itemsize, PREFIX, variant=variant)

    @torch.inference_mode()
    def codes(self, audio: Tensor) -> Tensor:
        """[n] float32 at 24 kHz, of a length that is checked -> [frames, codebooks] int64 on the encoder's device; the
        last frame may be begun only.
        """
        device = next(self._model.parameters()).device
        made = self._model.encode(audio.to(device)[None, None], num_quantizers=self.num_codes)
        num_frames = -(-len(audio) // self.frame_samples)
        codes: Tensor = made.audio_codes[0, :, :num_frames].T.contiguous()
        return codes


def _empty_model(section: object, where: str) -> Any:
    """Without the half that decodes; CheckpointError for a configuration that the library refuses."""
    from transformers import MimiConfig, MimiModel

    if not isinstance(section, Mapping):
        raise ConfigError(f"{where}: got {brief(section)}, expected an object; the checkpoint cannot clone voices")
    _check_sizes(section, where)
    try:
        model = MimiModel(MimiConfig(**{**section, **NO_WINDOW}))
    except Exception as error:  # the library raises whatever its layers raise
        raise CheckpointError(f"{where}: the encoder cannot be made ({error})") from error
    for part in DECODING_PARTS:
        if part in dict(model.named_children()):
            setattr(model, part, None)
    return model.eval().requires_grad_(False)


def _check_sizes(section: Mapping[str, Any], where: str) -> None:
    """Every number has a limit before a layer is made of it."""
    for key, value in section.items():
        numbers = value if isinstance(value, list) else [value]
        for number in numbers:
            if isinstance(number, int | float) and not isinstance(number, bool):
                check_number(f"{where}: {key}", number, 0, MAX_SIZE, raises=ConfigError)


class _Published(nn.Module):
    """The library's model under published names, its codebooks among the parameters though it holds them as buffers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._names = model.state_dict().keys()

    def named_parameters(self, *args: Any, **rest: Any) -> Iterator[tuple[str, nn.Parameter]]:
        for name, tensor in self.model.state_dict().items():
            yield f"model.{name}", tensor

    def locate(self, name: str) -> Target | None:
        """The library has moved these parts into one since the names were published."""
        plain = name.removeprefix(PREFIX)
        inner = f"encoder.{plain.replace('encoder.', 'encoder_seanet.', 1) if plain.startswith('encoder.') else plain}"
        found = next((each for each in (plain, inner) if each in self._names), None)
        return None if found is None else Target(f"model.{found}")

    def is_ignored(self, name: str) -> bool:
        return False
