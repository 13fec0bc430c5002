"""Qwen3-Omni: the published configuration loads whole, and what is wrong in one is named."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.published_qwen3_omni import PUBLISHED
from support.qwen3_omni import save_tiny_qwen3_omni, tiny_config
from support.versions import needs
from transformers import Qwen3OmniMoeConfig, Qwen3OmniMoeForConditionalGeneration

from vllm_omni.errors import CheckpointError, ConfigError
from vllm_omni.layers.weights import plan_loading, tensor_files
from vllm_omni.worker.ar.language_model import LanguageModelFolder, model_class

PARTS = ("thinker", "talker")
CPU = torch.device("cpu")


def meta_shapes(config: Qwen3OmniMoeConfig) -> dict[str, tuple[int, ...]]:
    """Of the library's model, under the names of checkpoints: each expert has its own tensors."""
    with torch.device("meta"):
        theirs = Qwen3OmniMoeForConditionalGeneration(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in theirs.state_dict().items():
        for inner in ("visual", "audio_tower"):
            name = name.replace(f"thinker.model.{inner}.", f"thinker.{inner}.")
        name = name.replace("thinker.model.language_model.", "thinker.model.")
        shape = tuple(tensor.shape)
        path, _, kind = name.partition(".mlp.experts.")
        for expert in range(shape[0]) if kind else ():
            own = f"{path}.mlp.experts.{expert}"
            if kind == "gate_up_proj":
                shapes |= {f"{own}.{half}_proj.weight": (shape[1] // 2, shape[2]) for half in ("gate", "up")}
            else:
                shapes[f"{own}.{kind}.weight"] = shape[1:]
        if not kind:
            shapes[name] = shape
    return shapes


def published_config(raw: Mapping[str, Any]) -> Qwen3OmniMoeConfig:
    return Qwen3OmniMoeConfig(
        **{key: value for key, value in raw.items() if key not in ("architectures", "model_type")}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_qwen3_omni(tmp_path_factory.mktemp("qwen3_omni") / "model")


def shortened() -> dict[str, Any]:
    """The published configuration with two of its layers, which are alike."""
    raw = copy.deepcopy(PUBLISHED)
    for part in ("thinker_config", "talker_config"):
        raw[part]["text_config"]["num_hidden_layers"] = 2
    return raw


def test_the_names_of_the_published_format_are_those_of_a_saved_checkpoint(folder: Path) -> None:
    assert set(meta_shapes(tiny_config())) == set(tensor_files(folder))


@pytest.mark.parametrize("part", PARTS)
def test_the_published_configuration_loads_with_nothing_missing_or_left_over(part: str) -> None:
    raw = shortened()
    shapes = {k: v for k, v in meta_shapes(published_config(raw)).items() if k.startswith(f"{part}.")}
    build = model_class(raw, "config.json", part)
    with torch.device("meta"):
        ours = build(build.read_config(raw, "config.json"))
    assert set(plan_loading(ours, shapes, "30B-A3B")) == set(shapes)
    lost = next(name for name in shapes if "layers.1.mlp.experts.9.up_proj" in name)
    for damaged in ({k: v for k, v in shapes.items() if k != lost}, {**shapes, f"{lost}.scale": (1,)}):
        with pytest.raises(CheckpointError):
            plan_loading(ours, damaged, "30B-A3B")


def test_a_checkpoint_without_a_talker_is_a_thinker(tmp_path: Path) -> None:
    """As the Thinking and Captioner variants are published."""
    folder = save_tiny_qwen3_omni(tmp_path / "model", config=tiny_config(enable_audio_output=False))
    assert all(name.startswith("thinker.") for name in tensor_files(folder))
    LanguageModelFolder.open(folder, "thinker").load(CPU, torch.float32)


@needs("transformers", "5.22", "its encoders stand where the test finds them")
def test_computed_buffers_are_those_of_the_reference(folder: Path) -> None:
    theirs = Qwen3OmniMoeForConditionalGeneration(tiny_config()).thinker.model
    ours: Any = LanguageModelFolder.open(folder, "thinker").load(CPU, torch.bfloat16)
    expected = dict(theirs.visual.named_buffers(prefix="visual.encoder"))
    expected |= dict(theirs.audio_tower.named_buffers(prefix="audio_tower"))
    found = dict(ours.encoders.named_buffers())
    assert set(found) == set(expected) and len(found) == 3
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], tensor)


@pytest.mark.parametrize(
    ("place", "value", "complaint"),
    [
        ("thinker_config", None, "thinker_config: got NoneType, expected an object"),
        ("thinker_config.vision_config.out_hidden_size", 31, "vision_config: gives rows of 31, expected 2048"),
        ("thinker_config.audio_config.d_model", "wide", "audio_config cannot be read"),
        ("thinker_config.text_config.num_experts_per_tok", 129, "num_experts_per_tok: got 129"),
        ("thinker_config.text_config.use_sliding_window", True, "use_sliding_window: got True"),
        ("thinker_config.text_config.shared_expert_intermediate_size", -1, "shared_expert_intermediate_size: got -1"),
    ],
)
def test_a_wrong_configuration_is_an_error_that_names_the_key(place: str, value: object, complaint: str) -> None:
    raw = shortened()
    *path, key = place.split(".")
    inner = raw
    for step in path:
        inner[step] = dict(inner[step])
        inner = inner[step]
    inner[key] = value
    with pytest.raises(ConfigError, match=complaint), torch.device("meta"):
        build = model_class(raw, "config.json", place.partition("_")[0])
        build(build.read_config(raw, "config.json"))
