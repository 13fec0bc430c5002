"""Qwen2 against transformers: greedy tokens, logits, hidden states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.language_models import TINY, assert_equals_transformers, save_random_model
from transformers import Qwen2Config as PublishedConfig
from transformers import Qwen2ForCausalLM

WINDOWS = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 1}, {"tie_word_embeddings": True}, WINDOWS])
def test_greedy_tokens_logits_and_states_equal_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = save_random_model(Qwen2ForCausalLM, PublishedConfig(**{**TINY, **changes}), tmp_path / "model")
    assert_equals_transformers(Qwen2ForCausalLM, folder)
