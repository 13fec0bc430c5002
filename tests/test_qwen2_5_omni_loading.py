"""Qwen2.5-Omni's thinker and talker: published configurations load whole, a part reads its own tensors alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from speech_helpers import save_tiny_omni, tiny_config
from torch import Tensor
from transformers import Qwen2_5OmniConfig, Qwen2_5OmniForConditionalGeneration

from vllm_omni.errors import CheckpointError, ConfigError
from vllm_omni.models import loader
from vllm_omni.models.language_model import load_language_model, model_class, read_model_config
from vllm_omni.models.loader import load_rows, plan_loading, tensor_files, weights_bytes
from vllm_omni.models.qwen2_5_omni_talker import TEXT_EMBEDDINGS, load_text_rows

CPU, FLOAT = torch.device("cpu"), torch.float32
TOKENS = {
    "audio_token_index": 151646,
    "image_token_index": 151655,
    "video_token_index": 151656,
    "audio_start_token_id": 151647,
    "audio_end_token_id": 151648,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "position_id_per_seconds": 25,
    "seconds_per_chunk": 2,
}
VISION = {
    "depth": 32,
    "embed_dim": 1280,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "hidden_act": "silu",
    "hidden_size": 1280,
    "in_channels": 3,
    "in_chans": 3,
    "intermediate_size": 3420,
    "model_type": "qwen2_5_omni_vision_encoder",
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "temporal_patch_size": 2,
    "tokens_per_second": 25,
    "window_size": 112,
}
AUDIO = {
    "activation_function": "gelu",
    "d_model": 1280,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "encoder_layers": 32,
    "max_source_positions": 1500,
    "model_type": "qwen2_5_omni_audio_encoder",
    "n_window": 100,
    "num_hidden_layers": 32,
    "num_mel_bins": 128,
    "scale_embedding": False,
}
DECODER = {
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "use_sliding_window": False,
}


def rope(*sections: int) -> dict[str, Any]:
    return {"rope_scaling": {"mrope_section": list(sections), "rope_type": "default", "type": "default"}}


def published(hidden_size: int, text: dict[str, Any], talker: dict[str, Any]) -> dict[str, Any]:
    """As config.json says it, without what neither part reads."""
    codes = {"tts_codec_start": 8293, "tts_codec_end": 8294, "tts_codec_pad": 8292, "tts_codec_mask": 8296}
    words = {"tts_text_start": 151860, "tts_text_end": 151861, "tts_text_pad": 151859}
    return {
        "architectures": ["Qwen2_5OmniModel"],
        "model_type": "qwen2_5_omni",
        "enable_audio_output": True,
        "thinker_config": {
            **TOKENS,
            "text_config": {**DECODER, "hidden_size": hidden_size, **text},
            "vision_config": {**VISION, "out_hidden_size": hidden_size},
            "audio_config": {**AUDIO, "output_dim": hidden_size},
        },
        "talker_config": {
            **TOKENS,
            **DECODER,
            **{f"{name}_token_id": value for name, value in (codes | words).items()},
            "embedding_size": hidden_size,
            "vocab_size": 8448,
            "hidden_size": 896,
            "num_hidden_layers": 24,
            **talker,
        },
    }


PUBLISHED = {
    "3B": published(
        2048,
        {
            "intermediate_size": 11008,
            "num_attention_heads": 16,
            "num_hidden_layers": 36,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            **rope(16, 24, 24),
        },
        {
            "head_dim": 64,
            "intermediate_size": 4864,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            **rope(16, 16, 0),
        },
    ),
    "7B": published(
        3584,
        {
            "intermediate_size": 18944,
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            **rope(16, 24, 24),
        },
        {
            "head_dim": 128,
            "intermediate_size": 18944,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            **rope(16, 24, 24),
        },
    ),
}


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
    load_language_model(folder, CPU, FLOAT, part)
    assert set(read) == {name for name in tensor_files(folder) if name.startswith(f"{part}.")}
    assert 0 < weights_bytes(folder, 4, f"{part}.") < weights_bytes(folder, 4)


def test_computed_buffers_are_those_of_the_reference(folder: Path) -> None:
    theirs = Qwen2_5OmniForConditionalGeneration(tiny_config()).thinker.model
    ours: Any = load_language_model(folder, CPU, torch.bfloat16, "thinker")
    expected = dict(theirs.visual.named_buffers(prefix="visual"))
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
        read_model_config(folder, part)


@pytest.mark.parametrize(
    ("part", "change", "complaint"),
    [
        ("thinker", {"thinker_config": None}, "thinker_config: got NoneType, expected an object"),
        ("thinker", {"vision_config": {"out_hidden_size": 31}}, "vision_config: gives rows of 31, expected 32"),
        ("thinker", {"audio_config": {"d_model": "wide"}}, "vision_config or audio_config cannot be read"),
        ("thinker", {"text_config": {"use_sliding_window": True}}, "use_sliding_window: got True"),
        ("talker", {"rope_parameters": {"mrope_section": [2, 3, 4], "rope_theta": 1e4}}, "expected three counts that"),
        ("talker", {"tts_codec_end_token_id": 64}, "tts_codec_end_token_id: got 64"),
        ("talker", {"embedding_size": 0}, "embedding_size: got 0"),
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
