"""The language model of Qwen3-VL against transformers' whole model, for text alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.language_models import TINY, assert_equals_transformers, save_random_model
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

ROPE = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
VISION = {
    "depth": 1,
    "hidden_size": 32,
    "num_heads": 2,
    "out_hidden_size": 32,
    "intermediate_size": 32,
    "deepstack_visual_indexes": [0],
}


@pytest.mark.parametrize(
    "changes",
    [{}, {"tied": True}, {"attention_bias": True}, {"num_key_value_heads": 4}],
)
def test_greedy_tokens_logits_and_states_equal_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    tied = changes.pop("tied", False)
    text = {**TINY, "head_dim": 16, "rope_parameters": ROPE, **changes}
    config = Qwen3VLConfig(text_config=text, vision_config=VISION, tie_word_embeddings=tied)
    folder = save_random_model(Qwen3VLForConditionalGeneration, config, tmp_path / "model")
    assert_equals_transformers(Qwen3VLForConditionalGeneration, folder)
