"""Qwen3 against transformers: greedy tokens, logits, hidden states, published names, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.ar import EOS, TINY, edit_json, make_engine, make_model_folder, make_task, run
from torch import Tensor
from transformers import Qwen3Config as PublishedConfig
from transformers import Qwen3ForCausalLM, Qwen3Model

from vllm_omni.errors import CheckpointError, ConfigError
from vllm_omni.layers.weights import plan_loading
from vllm_omni.messages import StageDone
from vllm_omni.models.qwen3.model import Qwen3, Qwen3Config
from vllm_omni.params import SamplingParams
from vllm_omni.worker.ar.language_model import LanguageModelFolder

PROMPT = [1, 60, 70, 80, 90, 100, 71, 81, 91, 60, 70, 80, 5, 6, 7]
LONG = 24
VARIANTS: dict[str, dict[str, Any]] = {
    "no groups": {"num_key_value_heads": 4},
    "groups of two": {"num_key_value_heads": 2},
    "one key-value head": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 32, "num_attention_heads": 3, "num_key_value_heads": 1},
    "narrow heads": {"head_dim": 4},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True},
    "one layer": {"num_hidden_layers": 1},
    "windows": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "windows everywhere": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0},
    "a pattern of windows": {
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "other theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 2.0}},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
}


def published(folder: Path) -> Any:
    return Qwen3ForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def states_of(model: Any, token_ids: list[int]) -> tuple[Tensor, ...]:
    """transformers' `hidden_states`, [T, D] each."""
    output = model(torch.tensor([token_ids]), output_hidden_states=True)
    return tuple(states[0] for states in output.hidden_states)


def assert_same_states(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_logits_and_states_equal_transformers(variant: str, tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model", **VARIANTS[variant])
    model = published(folder)
    num_layers = model.config.num_hidden_layers
    layers = list(range(num_layers + 1))
    engine = make_engine(
        folder,
        wanted=["states"],
        outputs={"states": {"layers": layers, "tokens": "completion"}},
        max_num_batched_tokens=7,
    )
    params = SamplingParams(temperature=0, max_tokens=LONG, ignore_eos=True, logprobs=5)
    done = run(engine, make_task(PROMPT, params))["r"]
    assert isinstance(done, StageDone)
    with torch.no_grad():
        expected = model.generate(
            torch.tensor([PROMPT]), max_new_tokens=LONG, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0].tolist()
        logits = model(torch.tensor([expected])).logits[0]
    assert done.payload.meta["token_ids"] == expected[len(PROMPT) :]
    for position, logprobs in enumerate(done.payload.meta["completions"][0]["logprobs"]):
        theirs = logits[len(PROMPT) + position - 1].log_softmax(-1)
        for token, value in logprobs:
            assert value == pytest.approx(float(theirs[token]), abs=1e-4)
    theirs = torch.cat(states_of(model, expected), dim=-1)[len(PROMPT) :]
    assert_same_states(done.payload.tensors["states"], theirs)


@pytest.mark.parametrize("layers", [[-2], [0], [-1], [1, 3], [3, 1, 0], [-4]])
def test_encoded_states_equal_transformers_whichever_layers_are_tapped(layers: list[int], tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model")
    engine = make_engine(folder, task="encode", wanted=["h"], outputs={"h": {"layers": layers}})
    done = run(engine, make_task(PROMPT))["r"]
    assert isinstance(done, StageDone)
    theirs = states_of(published(folder), PROMPT)
    assert_same_states(done.payload.tensors["h"], torch.cat([theirs[layer] for layer in layers], dim=-1))


def test_generation_ends_where_transformers_ends(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model")
    model = published(folder)
    free = model.generate(torch.tensor([PROMPT]), max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
    end = free[0, len(PROMPT) + 9].item()
    edit_json(folder / "generation_config.json", eos_token_id=[EOS, end])
    expected = published(folder).generate(torch.tensor([PROMPT]), max_new_tokens=30, do_sample=False, pad_token_id=0)
    done = run(make_engine(folder), make_task(PROMPT, SamplingParams(temperature=0, max_tokens=30)))["r"]
    assert isinstance(done, StageDone)
    assert done.payload.meta["token_ids"] == expected[0, len(PROMPT) :].tolist()
    assert done.payload.meta["finish_reason"] == "stop"


@pytest.mark.parametrize("tied", [True, False])
def test_a_base_model_folder_loads_without_prefix_and_head(tied: bool, tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model", base_model=True, tie_word_embeddings=tied)
    engine = make_engine(folder, task="encode", wanted=["h"], outputs={"h": {"layers": [-1]}})
    done = run(engine, make_task(PROMPT))["r"]
    assert isinstance(done, StageDone)
    theirs = states_of(Qwen3Model.from_pretrained(folder).eval(), PROMPT)
    assert_same_states(done.payload.tensors["h"], theirs[-1])
    assert LanguageModelFolder.open(folder).config.can_write == tied
    if not tied:
        with pytest.raises(ConfigError, match="has no head"):
            make_engine(folder)


def test_old_and_new_rope_keys_mean_the_same(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model", **VARIANTS["yarn"])
    new = LanguageModelFolder.open(folder).config
    rope = dict(VARIANTS["yarn"]["rope_parameters"])
    old = {"rope_theta": rope.pop("rope_theta"), "rope_scaling": {**rope, "type": rope.pop("rope_type")}}
    edit_json(folder / "config.json", rope_parameters=None, **old)
    assert LanguageModelFolder.open(folder).config == new


def test_low_precision_states_stay_near_those_of_transformers(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model")
    engine = make_engine(folder, task="encode", wanted=["h"], outputs={"h": {"layers": [-1]}}, dtype="bfloat16")
    done = run(engine, make_task(PROMPT))["r"]
    assert isinstance(done, StageDone)
    ours = done.payload.tensors["h"]
    assert ours.dtype == torch.bfloat16
    theirs = states_of(published(folder).to(torch.bfloat16), PROMPT)[-1].float()
    assert (ours.float() - theirs).norm() <= 0.03 * theirs.norm()


@pytest.mark.parametrize("build", [Qwen3Model, Qwen3ForCausalLM])
def test_the_published_names_and_shapes_of_the_qwen3_4b_encoder_load_whole(build: Any) -> None:
    keys = {
        "hidden_size": 2560,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 9728,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    }
    with torch.device("meta"):
        theirs = build(PublishedConfig(**keys))
        ours = Qwen3(Qwen3Config.from_json({**keys, "architectures": [build.__name__]}, "config.json"))
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    plan = plan_loading(ours, shapes, "Qwen3-4B")
    assert set(shapes) - set(plan) <= {"lm_head.weight"}
    for damaged in (
        {k: v for k, v in shapes.items() if not k.endswith("layers.7.mlp.up_proj.weight")},
        {**shapes, "model.layers.36.mlp.up_proj.weight": (9728, 2560)},
        {**shapes, "model.layers.0.mlp.up_proj.scale": (1,)},
    ):
        with pytest.raises(CheckpointError):
            plan_loading(ours, damaged, "Qwen3-4B")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"use_sliding_window": True, "sliding_window": -1}, "sliding_window: got -1"),
        ({"use_sliding_window": True, "max_window_layers": "all", "layer_types": None}, "max_window_layers: got 'all'"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "no sliding_window is set"),
        ({"layer_types": ["linear_attention"] * 3}, "layer_types: got"),
        ({"rope_parameters": {"rope_type": "su", "rope_theta": 1e4}}, "got 'su', expected one of default"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters.factor: got"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary",
        ),
        ({"architectures": ["GemmaForCausalLM"]}, "got 'GemmaForCausalLM'"),
        ({"architectures": [], "model_type": None}, "architectures: got none"),
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias: got True"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"hidden_size": 0}, "hidden_size: got 0"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers: got 1000000000000, expected at most 10000"),
        ({"vocab_size": "many"}, "vocab_size: got 'many'"),
        ({"num_key_value_heads": 3}, "3 key-value heads"),
    ],
)
def test_what_is_not_supported_is_an_error_that_names_the_key(
    changes: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    folder = make_model_folder(tmp_path / "model")
    edit_json(folder / "config.json", **changes)
    with pytest.raises((ConfigError, CheckpointError), match=complaint):
        LanguageModelFolder.open(folder)


def test_a_folder_with_a_missing_tensor_does_not_load(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model")
    edit_json(folder / "config.json", num_hidden_layers=TINY["num_hidden_layers"] + 1)
    with pytest.raises(CheckpointError, match=r"layers\.3\."):
        LanguageModelFolder.open(folder).load(torch.device("cpu"), torch.float32)
