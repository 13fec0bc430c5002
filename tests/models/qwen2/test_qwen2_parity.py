"""Qwen2 against transformers: greedy tokens, logits, hidden states, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.language_models import TINY, assert_equals_transformers, read_config, save_random_model
from transformers import Qwen2Config as PublishedConfig
from transformers import Qwen2ForCausalLM

from vllm_omni.errors import ConfigError


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 1}, {"tie_word_embeddings": True}])
def test_greedy_tokens_logits_and_states_equal_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = save_random_model(Qwen2ForCausalLM, PublishedConfig(**{**TINY, **changes}), tmp_path / "model")
    assert_equals_transformers(Qwen2ForCausalLM, folder)


def test_a_sliding_window_is_a_config_error_that_names_the_key(tmp_path: Path) -> None:
    folder = save_random_model(Qwen2ForCausalLM, PublishedConfig(**TINY), tmp_path / "model")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_sliding_window": True}))
    with pytest.raises(ConfigError, match="use_sliding_window: got True"):
        read_config(folder)
