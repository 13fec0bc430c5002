"""Mistral and Ministral against transformers: greedy tokens, logits, hidden states; windows, and what they free."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ar import assert_clean, edit_json, make_engine, make_task, make_tokenizer, run, tokens_of
from support.language_models import PROMPT, TINY, assert_equals_transformers, read_config, save_random_model
from transformers import MinistralConfig as PublishedMinistralConfig
from transformers import MinistralForCausalLM, MistralForCausalLM
from transformers import MistralConfig as PublishedConfig

from vllm_omni.errors import ConfigError, ResourceError
from vllm_omni.layers.weights import plan_loading
from vllm_omni.messages import StageDone, StageFailed
from vllm_omni.models.mistral.model import Mistral, MistralConfig
from vllm_omni.params import SamplingParams

VARIANTS: dict[str, dict[str, Any]] = {
    "no window": {"sliding_window": None},
    "a window wider than the text": {"sliding_window": 100},
    "a window": {"sliding_window": 9},
    "a narrow window": {"sliding_window": 2},
    "a window of one block": {"sliding_window": 4},
    "wide heads": {"head_dim": 24, "sliding_window": 9},
    "tied": {"tie_word_embeddings": True, "sliding_window": 5},
    "no groups": {"num_key_value_heads": 4, "sliding_window": 5},
}
GREEDY = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)


def make_folder(folder: Path, build: Any = MistralForCausalLM, **changes: Any) -> Path:
    kind = PublishedConfig if build is MistralForCausalLM else partial(PublishedMinistralConfig, head_dim=8)
    save_random_model(build, kind(**{**TINY, **changes}), folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def expected_tokens(folder: Path, prompt: list[int]) -> list[int]:
    published = MistralForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        written = published.generate(
            torch.tensor([prompt]), max_new_tokens=GREEDY.max_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return list(written[0, len(prompt) :].tolist())


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_logits_and_states_equal_transformers(variant: str, tmp_path: Path) -> None:
    assert_equals_transformers(MistralForCausalLM, make_folder(tmp_path / "model", **VARIANTS[variant]))


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 6},
        {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        {"sliding_window": 6, "layer_types": ["full_attention"] * 3},
    ],
)
def test_ministral_has_a_pattern_of_layers(changes: dict[str, Any], tmp_path: Path) -> None:
    assert_equals_transformers(MinistralForCausalLM, make_folder(tmp_path / "model", MinistralForCausalLM, **changes))


def test_what_a_file_leaves_out_is_as_in_transformers(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", num_attention_heads=8, num_key_value_heads=8, sliding_window=4096)
    edit_json(folder / "config.json", sliding_window=None, num_key_value_heads=None, head_dim=None)
    config: Any = read_config(folder)
    assert (config.windows, config.num_kv_heads, config.head_dim) == ((4096,) * 3, 8, 4)
    edit_json(folder / "config.json", layer_types=["full_attention"] * 3)
    assert read_config(folder).window == 4096, "transformers reads no pattern here"


def test_the_published_names_and_shapes_of_mistral_7b_load_whole() -> None:
    keys = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": 4096}
    raw = {**keys, **heads, "architectures": ["MistralForCausalLM"]}
    with torch.device("meta"):
        theirs = MistralForCausalLM(PublishedConfig(**keys, **heads))
        ours = Mistral(MistralConfig.from_json(raw, "config.json", has_pattern=False))
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert set(plan_loading(ours, shapes, "Mistral-7B")) == set(shapes)


@pytest.mark.parametrize("window", [2, 4, 7])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_text_longer_than_the_pool_is_written_since_blocks_behind_the_window_are_freed(
    window: int, prefix_caching: bool, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / "model", sliding_window=window)
    engine = make_engine(folder, num_blocks=5, max_num_batched_tokens=8, prefix_caching=prefix_caching)
    prompt = [*PROMPT, *range(100, 130)]
    expected = expected_tokens(folder, prompt)
    assert tokens_of(run(engine, make_task(prompt, GREEDY))["r"]) == expected
    assert tokens_of(run(engine, make_task(prompt, GREEDY))["r"]) == expected
    assert_clean(engine)
    full = make_folder(tmp_path / "full", sliding_window=None)
    with pytest.raises(ResourceError, match="expected at most 20, the whole KV pool"):
        run(make_engine(full, num_blocks=5, max_num_batched_tokens=8), make_task(prompt, GREEDY))


def test_a_prefix_is_served_and_the_text_is_the_same(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", sliding_window=7)
    engine = make_engine(folder, num_blocks=64)
    prompt = [*PROMPT, *range(100, 130)]
    run(engine, make_task(prompt, GREEDY, "first"))
    again = run(engine, make_task(prompt, GREEDY), make_task([*prompt[:30], 5, 6], GREEDY, "branch"))
    assert tokens_of(again["r"]) == expected_tokens(folder, prompt)
    assert tokens_of(again["branch"]) == expected_tokens(folder, [*prompt[:30], 5, 6])
    done = again["r"]
    assert isinstance(done, StageDone) and done.metrics["cache_hits"] == 44


def test_preempted_sequences_with_windows_write_the_same(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", sliding_window=12)
    engine = make_engine(folder, num_blocks=7, max_num_batched_tokens=8)
    prompts = {f"r{number}": [number + 3, *PROMPT[:4]] for number in range(4)}  # short ones, which grow
    written = run(engine, *(make_task(prompt, GREEDY, name) for name, prompt in prompts.items()))
    for name, prompt in prompts.items():
        assert not isinstance(written[name], StageFailed), written[name]
        assert tokens_of(written[name]) == expected_tokens(folder, prompt)
    assert engine.get_stats()["num_preemptions"] > 0
    assert_clean(engine)


def test_tapped_states_of_a_windowed_model_are_whole(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", sliding_window=5)
    outputs = {"h": {"layers": [-1], "tokens": "prompt"}}
    engine = make_engine(folder, wanted=["h"], outputs=outputs, num_blocks=64)
    done = run(engine, make_task(PROMPT, GREEDY))["r"]
    assert isinstance(done, StageDone)
    with torch.no_grad():
        published = MistralForCausalLM.from_pretrained(folder).eval()
        theirs = published(torch.tensor([PROMPT]), output_hidden_states=True).hidden_states[-1][0]
    assert (done.payload.tensors["h"] - theirs).norm() <= 1e-4 * theirs.norm()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"sliding_window": 0}, "sliding_window: got 0"),
        ({"sliding_window": "wide"}, "sliding_window: got 'wide'"),
        ({"layer_types": ["sliding_attention"]}, "layer_types: got 1, expected 3"),
        ({"layer_types": ["chunked_attention"] * 3}, "layer_types: got .*chunked"),
        ({"layer_types": "sliding_attention"}, "layer_types: got 'sliding_attention'"),
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu'"),
    ],
)
def test_what_is_not_supported_is_a_config_error_that_names_the_key(
    changes: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / "model", MinistralForCausalLM)
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ConfigError, match=complaint):
        read_config(folder)
