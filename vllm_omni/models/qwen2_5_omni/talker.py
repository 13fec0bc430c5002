"""The talker of Qwen2.5-Omni (arXiv 2503.20215): a Qwen2.5 decoder that turns the thinker's states into codes of
speech. Loads the `talker.*` tensors of the published checkpoints.

Legend: N tokens of a step, R of them, D hidden size, E width of the thinker's states, V codes and their marks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vllm_omni.errors import ConfigError
from vllm_omni.layers.decoder import OMNI_ROPE, Decoder, DecoderConfig, count_of, locate_fused, sub_config
from vllm_omni.layers.forward_context import ForwardContext
from vllm_omni.layers.linear import Linear
from vllm_omni.layers.weights import Target, load_rows
from vllm_omni.models.qwen2_5_omni.token2wav.config import DiTConfig
from vllm_omni.utils.checks import check_number

HEAD_DIM = 128  # where the file has none
TEXT_EMBEDDINGS = "thinker.model.embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class TalkerConfig(DecoderConfig):
    """The decoder, what it is fed, and its marks."""

    embedding_size: int  # the width of what it is fed
    codec_bos: int  # codes that are not spoken: begin, end, pad, and the mask that stands for the prompt
    codec_end: int
    codec_pad: int
    codec_mask: int
    text_end: int  # text tokens of the thinker, behind the reply
    text_pad: int
    last_spoken: int  # the highest code that the checkpoint's token2wav can speak

    @property
    def can_write(self) -> bool:
        return True

    @property
    def silent_codes(self) -> frozenset[int]:
        """What is never to be spoken: marks, and codes that token2wav does not know."""
        marks = {self.codec_bos, self.codec_end, self.codec_pad, self.codec_mask}
        return frozenset({*marks, *range(self.last_spoken + 1, self.vocab_size)})

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], where: str) -> TalkerConfig:
        """From the config.json of a whole checkpoint; ConfigError with the key for what is missing or wrong."""
        talker = sub_config(raw, "talker_config", where)
        inside = f"{where}: talker_config"
        last = count_of(talker, "vocab_size", inside) - 1
        return cls(
            **cls.fields_from(talker, inside, HEAD_DIM, OMNI_ROPE),
            qkv_bias=True,
            output_bias=False,
            head_norms=False,
            embedding_size=count_of(talker, "embedding_size", inside),
            codec_bos=_token(talker, "tts_codec_start_token_id", inside, last),
            codec_end=_token(talker, "tts_codec_end_token_id", inside, last),
            codec_pad=_token(talker, "tts_codec_pad_token_id", inside, last),
            codec_mask=_token(talker, "tts_codec_mask_token_id", inside, last),
            text_end=_token(talker, "tts_text_end_token_id", inside),
            text_pad=_token(talker, "tts_text_pad_token_id", inside),
            last_spoken=_last_spoken(raw, where, last),
        )


class Talker(nn.Module):
    """The talker of one folder. Its tokens are codes; what they are fed besides comes as `context.input_rows` [.., E],
    which a code's embedding joins and the prompt's replace.
    """

    prompt_reader = None  # it reads no prompt: states alone
    text_only = None
    other_parts = ()
    is_capturable = False  # its tokens have positions of their own
    joins_rows = True

    def __init__(self, config: TalkerConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size)
        self.thinker_to_talker_proj = Linear(config.embedding_size, config.hidden_size)
        self.decoder = Decoder(config)
        self.codec_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @classmethod
    def read_config(cls, raw: Mapping[str, Any], where: str) -> TalkerConfig:
        return TalkerConfig.from_json(raw, where)

    def forward(self, token_ids: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        """See LanguageModel."""
        embeddings = self.embed_tokens(token_ids)
        if context.input_rows is not None:
            embeddings = context.input_rows.merge(embeddings)
        states: Tensor = self.decoder(self.thinker_to_talker_proj(embeddings), positions, context)
        return states

    def compute_logits(self, states: Tensor) -> Tensor:
        """states: [R, D] after the final norm -> [R, V]."""
        logits: Tensor = self.codec_head(states)
        return logits

    def locate(self, name: str) -> Target | None:
        """The parameter for a published name."""
        name = name.removeprefix("talker.")
        if not name.startswith("model.") or name.startswith("model.embed_tokens."):
            return Target(name.removeprefix("model."))
        return locate_fused(self, f"decoder.{name.removeprefix('model.')}")

    def is_ignored(self, name: str) -> bool:
        """Buffers of old files."""
        return name.endswith(".inv_freq")


def load_text_rows(
    folder: Path,
    token_ids: list[int],
    width: int,
    device: torch.device,
    dtype: torch.dtype,
    weights_variant: str | None = None,
) -> dict[int, Tensor]:
    """Text token -> its embedding [E] in the thinker, read from the checkpoint row by row."""
    rows = load_rows(folder, TEXT_EMBEDDINGS, token_ids, width, weights_variant)
    return dict(zip(token_ids, rows.to(device=device, dtype=dtype), strict=True))


def _last_spoken(raw: Mapping[str, Any], where: str, last: int) -> int:
    """The last code but where token2wav has fewer."""
    if "token2wav_config" not in raw:
        return last
    inside = sub_config(raw, "token2wav_config", where)
    dit = DiTConfig.from_dict(inside.get("dit_config") or {}, f"{where}: token2wav_config.dit_config")
    return min(last, dit.num_embeds)


def _token(raw: Mapping[str, Any], key: str, where: str, most: int | None = None) -> int:
    check_number(f"{where}: {key}", raw.get(key), 0, most, integer=True, raises=ConfigError)
    return int(raw[key])
