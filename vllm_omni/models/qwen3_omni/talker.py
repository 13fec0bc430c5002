"""The talker of Qwen3-Omni (arXiv 2509.17765): a Qwen3 decoder with sparse experts that writes the first code of each
frame, 12.5 a second, its projections of the thinker's states, and its code predictor. Loads the `talker.*` tensors of
the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_omni.models.qwen3_omni.talker_config import TalkerConfig
from vllm_omni.worker.ar.frames.talker import FrameTalker, Projection

TEXT_EMBEDDINGS = "thinker.model.embed_tokens.weight"


class Talker(FrameTalker):
    """The talker of one folder."""

    is_capturable = False  # which experts have tokens is asked of the device

    def __init__(self, config: TalkerConfig) -> None:
        super().__init__(config, config.predictor, lambda index: config.experts.make_mlp(config, index))
        self.config = config
        widths = config.thinker_size, config.intermediate_size, config.hidden_size
        self.text_projection, self.hidden_projection = Projection(*widths), Projection(*widths)

    @classmethod
    def read_config(cls, raw: Mapping[str, Any], where: str) -> TalkerConfig:
        return TalkerConfig.from_json(raw, where)
