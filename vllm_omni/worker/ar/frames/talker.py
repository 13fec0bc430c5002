"""What the talkers of Qwen3-TTS and Qwen3-Omni are alike in: a decoder that writes the first code of each frame, and a
code predictor that writes the others.

Legend: N tokens of a step, R of them, D hidden size, V codes of the first codebook and their marks.
"""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from vllm_omni.layers.decoder import Decoder, DecoderConfig, MakeMLP, locate_fused
from vllm_omni.layers.forward_context import ForwardContext
from vllm_omni.layers.linear import Linear
from vllm_omni.layers.weights import Target
from vllm_omni.worker.ar.frames.code_predictor import CodePredictor, PredictorConfig

PREDICTOR = "code_predictor"


class Projection(nn.Module):
    """[T, width] of the text or of another model -> [T, size]."""

    def __init__(self, width: int, hidden: int, size: int) -> None:
        super().__init__()
        self.linear_fc1 = Linear(width, hidden)
        self.linear_fc2 = Linear(hidden, size)

    def forward(self, states: Tensor) -> Tensor:
        projected: Tensor = self.linear_fc2(F.silu(self.linear_fc1(states)))
        return projected


class FrameTalker(nn.Module):
    """The talker of one folder. Its tokens are first codes; the prompt's stand for rows, and what joins written ones
    comes as rows too: `context.input_rows` [.., D].
    """

    prompt_reader = None  # what its prompts hold is no chat
    text_only = None
    other_parts = ()
    is_capturable: ClassVar[bool] = True
    joins_rows = True
    embeddings: ClassVar[tuple[str, ...]] = ("codec_embedding",)  # that checkpoints have among the decoder's tensors

    def __init__(self, config: DecoderConfig, predictor: PredictorConfig, make_mlp: MakeMLP | None = None) -> None:
        super().__init__()
        self.codec_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.decoder = Decoder(config, make_mlp)
        self.codec_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.code_predictor = CodePredictor(predictor)

    def forward(self, token_ids: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        """See LanguageModel."""
        embeddings = self.codec_embedding(token_ids)
        if context.input_rows is not None:
            embeddings = context.input_rows.merge(embeddings)
        states: Tensor = self.decoder(embeddings, positions, context)
        return states

    def compute_logits(self, states: Tensor) -> Tensor:
        """states: [R, D] after the final norm -> [R, V]."""
        logits: Tensor = self.codec_head(states)
        return logits

    def locate(self, name: str) -> Target | None:
        """The parameter for a published name."""
        name = name.removeprefix("talker.")
        if name.startswith(f"{PREDICTOR}."):
            found = self.code_predictor.locate(name.removeprefix(f"{PREDICTOR}."))
            return None if found is None else Target(f"{PREDICTOR}.{found.parameter}", found.rows)
        inner = name.removeprefix("model.")
        if inner == name or inner.partition(".")[0] in self.embeddings:
            return Target(inner)
        return locate_fused(self, f"decoder.{inner}")

    def is_ignored(self, name: str) -> bool:
        """Buffers of old files."""
        return name.endswith(".inv_freq")
