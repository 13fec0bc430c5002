"""The language model of Qwen3-VL against transformers' whole model, for text alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.ar import make_encoder, make_task, make_tokenizer, run, states_of
from support.language_models import PROMPT, TINY, assert_equals_transformers, save_random_model
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLModel, Qwen3VLTextModel

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


LAYERS = [0, 1, 2, -1]


def make_folder(build: Any, folder: Path, **changes: Any) -> Path:
    """A folder of this class with its tokenizer."""
    text = {**TINY, "head_dim": 16, "rope_parameters": ROPE, **changes}
    config = Qwen3VLConfig(text_config=text, vision_config=VISION, tie_word_embeddings=True)
    save_random_model(build, config.text_config if build is Qwen3VLTextModel else config, folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def published_states(build: Any, folder: Path, token_ids: list[int]) -> Tensor:
    """[T, layers D]."""
    output = build.from_pretrained(folder).eval()(torch.tensor([token_ids]), output_hidden_states=True)
    return torch.cat([output.hidden_states[layer][0] for layer in LAYERS], dim=-1)


@pytest.mark.parametrize("build", [Qwen3VLForConditionalGeneration, Qwen3VLModel, Qwen3VLTextModel])
@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 4}])
def test_an_encoder_of_any_published_class_gives_the_states_of_its_layers(
    build: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    folder = make_folder(build, tmp_path / "model")
    engine = make_encoder(folder, outputs={"h": {"layers": LAYERS}}, **options)
    other = list(range(40, 60))
    ended = run(engine, make_task(PROMPT, request_id="a"), make_task(other, request_id="b"))
    for name, token_ids in (("a", PROMPT), ("b", other)):
        expected = published_states(build, folder, token_ids)
        torch.testing.assert_close(states_of(ended[name]), expected, rtol=1e-4, atol=1e-4)
