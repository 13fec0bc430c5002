"""Qwen2.5-Omni's thinker and talker: published configurations load whole, a part reads its own tensors alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support.published_omni import PUBLISHED, rope
from support.speech import save_tiny_omni, tiny_config
from support.versions import needs
from torch import Tensor
from transformers import Qwen2_5OmniConfig, Qwen2_5OmniForConditionalGeneration
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniRotaryEmbedding

from vllm_omni.errors import CheckpointError, ConfigError
from vllm_omni.layers import weights as loader
from vllm_omni.layers.rotary import RotaryEmbedding
from vllm_omni.layers.weights import load_rows, plan_loading, tensor_files, weights_bytes
from vllm_omni.models.qwen2_5_omni.talker import TEXT_EMBEDDINGS, load_text_rows
from vllm_omni.models.qwen2_5_omni.token2wav.config import Token2WavConfig
from vllm_omni.worker.ar.language_model import LanguageModelFolder, model_class

CPU, FLOAT = torch.device("cpu"), torch.float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_omni(tmp_path_factory.mktemp("omni") / "model")


def published_name(name: str) -> str:
    """How a checkpoint calls what the library's module calls otherwise."""
    for inner in ("visual", "audio_tower"):
        name = name.replace(f"thinker.model.{inner}.", f"thinker.{inner}.")
    return name.replace("thinker.model.language_model.", "thinker.model.")


def meta_shapes(config: Qwen2_5OmniConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        theirs = Qwen2_5OmniForConditionalGeneration(config)
    return {published_name(name): tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}


def test_the_names_of_the_published_format_are_those_of_a_saved_checkpoint(folder: Path) -> None:
    assert set(meta_shapes(tiny_config())) == set(tensor_files(folder))


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_configurations_load_with_nothing_missing_or_left_over(size: str) -> None:
    """The configurations are those of the files, with their sources in published_omni."""
    raw = PUBLISHED[size]
    shapes = meta_shapes(Qwen2_5OmniConfig(thinker_config=raw["thinker_config"], talker_config=raw["talker_config"]))
    for part in ("thinker", "talker"):
        own = {name: shape for name, shape in shapes.items() if name.startswith(f"{part}.")}
        build = model_class(raw, size, part)
        with torch.device("meta"):
            ours = build(build.read_config(raw, size))
        assert set(plan_loading(ours, own, size)) == set(own)
        name = next(name for name in own if name.endswith("layers.7.mlp.up_proj.weight"))
        for damaged in ({k: v for k, v in own.items() if k != name}, {**own, f"{name}.scale": (1,)}):
            with pytest.raises(CheckpointError):
                plan_loading(ours, damaged, size)


@pytest.mark.parametrize("size", PUBLISHED)
def test_what_published_configurations_leave_out_is_what_the_reference_takes(size: str) -> None:
    raw = {**PUBLISHED[size]}
    for keys in (("rope_theta",), ("rope_theta", "rope_scaling")):
        text = without(raw["thinker_config"]["text_config"], keys)
        talker = without({**raw["talker_config"], **rope(16, 24, 24), "head_dim": 128}, keys)
        raw |= {"thinker_config": {**raw["thinker_config"], "text_config": text}, "talker_config": talker}
        theirs = Qwen2_5OmniConfig(thinker_config=raw["thinker_config"], talker_config=talker)
        for part, config in (("thinker", theirs.thinker_config.text_config), ("talker", theirs.talker_config)):
            reference = Qwen2_5OmniRotaryEmbedding(config)
            read = model_class(raw, size, part).read_config(raw, size)
            ours = RotaryEmbedding(read.head_dim, read.max_position_embeddings, read.rope)
            torch.testing.assert_close(ours.frequencies, reference.inv_freq)
            assert ours.axes is not None and ours.axes.bincount().tolist() == list(reference.mrope_section)


def test_the_published_token2wav_has_the_references_sizes_under_other_names() -> None:
    for raw in PUBLISHED.values():
        assert Token2WavConfig.from_dict(raw["token2wav_config"]) == Token2WavConfig.from_dict({})
        for token2wav in (raw["token2wav_config"], {}, None):
            given = without(raw, ["token2wav_config"]) | ({} if token2wav is None else {"token2wav_config": token2wav})
            config = model_class(given, "config.json", "talker").read_config(given, "config.json")
            assert config.last_spoken == (8447 if token2wav is None else 8193)


@pytest.mark.parametrize("name", ["dim", "depth", "heads"])
def test_an_old_name_that_says_something_else_is_refused(name: str) -> None:
    raw = PUBLISHED["7B"]["token2wav_config"]
    with pytest.raises(ConfigError, match=f"dit_config: {name}: got 7"):
        Token2WavConfig.from_dict({**raw, "dit_config": {**raw["dit_config"], name: 7}})


def without(raw: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key not in keys}


@pytest.mark.parametrize("part", ["thinker", "talker"])
def test_a_part_reads_its_own_tensors_alone(folder: Path, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    class Recording:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._handle = safe_open(*args, **kwargs)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None: ...

        def get_slice(self, name: str) -> Any:
            return self._handle.get_slice(name)

        def get_tensor(self, name: str) -> Tensor:
            read.append(name)
            return self._handle.get_tensor(name)

    monkeypatch.setattr(loader, "safe_open", Recording)
    LanguageModelFolder.open(folder, part).load(CPU, FLOAT)
    assert set(read) == {name for name in tensor_files(folder) if name.startswith(f"{part}.")}
    assert 0 < weights_bytes(folder, 4, f"{part}.") < weights_bytes(folder, 4)


@needs("transformers", "5.22", "its encoders stand where the test finds them")
def test_computed_buffers_are_those_of_the_reference(folder: Path) -> None:
    theirs = Qwen2_5OmniForConditionalGeneration(tiny_config()).thinker.model
    ours: Any = LanguageModelFolder.open(folder, "thinker").load(CPU, torch.bfloat16)
    expected = dict(theirs.visual.named_buffers(prefix="visual.encoder"))
    expected |= dict(theirs.audio_tower.named_buffers(prefix="audio_tower"))
    found = dict(ours.encoders.named_buffers())
    assert set(found) == set(expected) and len(found) == 3
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], tensor)


def test_rows_of_the_text_embeddings_are_read_one_by_one(folder: Path) -> None:
    with safe_open(tensor_files(folder)[TEXT_EMBEDDINGS], framework="pt") as handle:
        table = handle.get_tensor(TEXT_EMBEDDINGS)
    rows = load_text_rows(folder, [111, 3], 32, CPU, FLOAT)
    assert list(rows) == [111, 3]
    assert torch.equal(rows[111], table[111]) and torch.equal(rows[3], table[3])
    with pytest.raises(CheckpointError, match=r"expected rows \[128\] of width 32"):
        load_rows(folder, TEXT_EMBEDDINGS, [128], 32)


@pytest.mark.parametrize(
    ("part", "complaint"),
    [(None, "got part None of Qwen2_5Omni.*expected one of talker, thinker"), ("token2wav", "got part 'token2wav'")],
)
def test_a_part_that_is_no_language_model_is_refused(folder: Path, part: str | None, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        LanguageModelFolder.open(folder, part)


@pytest.mark.parametrize(
    ("part", "change", "complaint"),
    [
        ("thinker", {"thinker_config": None}, "thinker_config: got NoneType, expected an object"),
        ("thinker", {"vision_config": {"out_hidden_size": 31}}, "vision_config: gives rows of 31, expected 32"),
        ("thinker", {"audio_config": {"d_model": "wide"}}, "audio_config cannot be read"),
        ("thinker", {"text_config": {"use_sliding_window": True}}, "use_sliding_window: got True"),
        ("talker", {"rope_parameters": {"mrope_section": [2, 3, 4], "rope_theta": 1e4}}, "expected three counts that"),
        ("talker", {"tts_codec_end_token_id": 64}, "tts_codec_end_token_id: got 64"),
        ("talker", {"embedding_size": 0}, "embedding_size: got 0"),
        ("talker", {"rms_norm_eps": "small"}, "rms_norm_eps: got 'small'"),
        ("talker", {"rope_parameters": {"rope_theta": 1e4}}, r"mrope_section: got \(16, 24, 24\)"),
    ],
)
def test_a_wrong_configuration_is_an_error_that_names_the_key(
    part: str, change: dict[str, Any], complaint: str
) -> None:
    raw = {"architectures": ["Qwen2_5OmniForConditionalGeneration"], **tiny_config().to_diff_dict()}
    raw = {**raw, **{key: tiny_config().to_dict()[key] for key in ("thinker_config", "talker_config")}}
    for key, value in change.items():
        if key in raw:
            raw[key] = value
        elif part == "thinker":
            inner = raw["thinker_config"]
            raw["thinker_config"] = {**inner, key: {**inner[key], **value}}
        else:
            raw["talker_config"] = {**raw["talker_config"], key: value}
    with pytest.raises(ConfigError, match=complaint), torch.device("meta"):
        build = model_class(raw, "config.json", part)
        build(build.read_config(raw, "config.json"))
