"""The UMT5 encoder: transformers' module, built from the checkpoint's configuration and filled by our loader.

Legend: t tokens of a text, J width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vllm_omni.errors import ConfigError
from vllm_omni.layers.meta_device import on_meta_device
from vllm_omni.layers.weights import Target, allocate, load_weights
from vllm_omni.utils.files import read_json

MODEL_TYPE = "umt5"
TIED = "encoder.embed_tokens.weight"  # a copy of `shared.weight`
DECODER = ("decoder.", "lm_head.")  # of a whole UMT5


def read_config(folder: Path) -> Any:
    """transformers' own of a `config.json`; ConfigError for another model's, and for one that it cannot be built of."""
    from transformers import UMT5Config

    raw, where = read_json(folder / "config.json"), f"{folder}/config.json"
    if raw.get("model_type") != MODEL_TYPE:
        raise ConfigError(f"{where}: model_type: got {raw.get('model_type')!r:.80}, expected {MODEL_TYPE!r}")
    try:
        return UMT5Config(**{key: value for key, value in raw.items() if key != "model_type"})
    except Exception as error:  # the library raises whatever its validation raises
        raise ConfigError(f"{where}: it cannot be read ({error})") from error


class UMT5Encoder(nn.Module):
    """Words to states. Its parameters have their published names."""

    def __init__(self, config: Any) -> None:
        from transformers import UMT5EncoderModel

        super().__init__()
        built = UMT5EncoderModel._from_config(config)
        self.shared, self.encoder = built.shared, built.encoder
        self.encoder.embed_tokens = self.shared

    @classmethod
    def load(
        cls, folder: Path, config: Any, device: torch.device, dtype: torch.dtype, variant: str | None
    ) -> UMT5Encoder:
        with on_meta_device():
            model = cls(config)
        allocate(model, device, dtype)
        load_weights(model, folder, variant=variant)
        return model

    @torch.inference_mode()
    def encode(self, token_ids: Sequence[int]) -> Tensor:
        """[t] -> [t, J], the last states; of no token at all (a tokenizer that ends no text makes so many of an empty
        one) a row of zeros, as the transformer fills texts up with.
        """
        if not token_ids:
            return self.shared.weight.new_zeros(1, self.shared.weight.shape[1])
        ids = torch.tensor([list(token_ids)], device=self.shared.weight.device)
        states: Tensor = self.encoder(input_ids=ids).last_hidden_state[0]
        return states

    def locate(self, name: str) -> Target | None:
        """See layers/weights.py."""
        return None if name == TIED else Target(name)

    def is_ignored(self, name: str) -> bool:
        return name == TIED or name.startswith(DECODER)
