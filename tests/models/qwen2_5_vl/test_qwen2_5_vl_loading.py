"""What a Qwen2.5-VL folder must hold so that its model sees, under which names, and what it costs; and the published
shapes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.ar import edit_json, make_model_folder, make_spec, make_stage, make_task, states_of
from support.ar import load as load_engine
from support.ar import run as run_engine
from support.media import picture
from support.seeing import Reference, save_tiny_vl, user, vl_processor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from vllm_omni import Omni, SamplingParams
from vllm_omni.config.schema import LimitsConfig
from vllm_omni.config.shipped import config_for_model
from vllm_omni.engine.base import ReadPorts
from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.models.qwen2_5_vl.model import Qwen2_5_VL, Qwen2_5_VLText
from vllm_omni.request import OmniRequest
from vllm_omni.worker.ar.language_model import LanguageModelFolder

CPU = torch.device("cpu")
LAYERS = {"h": {"layers": [1, 2, 3], "tokens": "prompt"}}
# what shapes the model in config.json of Qwen/Qwen2.5-VL-7B-Instruct, a flat early file; compared with the copy
# of the text encoder's of Qwen/Qwen-Image in public training tools (QWEN2_5_VL_CONFIG_JSON)
PUBLISHED: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "hidden_act": "silu",
    "hidden_size": 3584,
    "image_token_id": 151655,
    "intermediate_size": 18944,
    "max_position_embeddings": 128000,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"mrope_section": [16, 24, 24], "type": "mrope"},
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "video_token_id": 151656,
    "vision_config": {
        "depth": 32,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "hidden_act": "silu",
        "hidden_size": 1280,
        "in_chans": 3,
        "intermediate_size": 3420,
        "model_type": "qwen2_5_vl",
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
    },
    "vocab_size": 152064,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_vl(tmp_path / "model")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def rename(folder: Path, prefixes: dict[str, str]) -> None:
    """Every tensor under the first of these prefixes that fits, changed."""

    def renamed(name: str) -> str:
        return next((new + name.removeprefix(old) for old, new in prefixes.items() if name.startswith(old)), name)

    save_file({renamed(name): tensor for name, tensor in weights(folder).items()}, folder / "model.safetensors")


@pytest.mark.parametrize(
    "prefixes",
    [
        {"model.visual.": "visual.", "model.language_model.": "model."},
        {
            "visual.": "model.visual.",
            "model.language_model.": "model.language_model.",
            "model.": "model.language_model.",
        },
    ],
)
def test_old_and_new_names_of_tensors_mean_the_same(prefixes: dict[str, str], folder: Path) -> None:
    expected = Reference(folder).write(user(picture(24, 40), "What?"), 2)[1]
    rename(folder, prefixes)
    assert any(name.startswith(next(iter(prefixes.values()))) for name in weights(folder))
    engine = load_engine(make_spec(make_stage(folder, chat_template=True, outputs=LAYERS)), whole=["h"])
    found = run_engine(engine, make_task(user(picture(24, 40), "What?"), SamplingParams(max_tokens=2)))["r"]
    torch.testing.assert_close(states_of(found), expected, rtol=1e-4, atol=1e-4)


def test_the_flat_files_of_early_checkpoints_see_as_well(folder: Path) -> None:
    new = LanguageModelFolder.open(folder)
    raw = json.loads((folder / "config.json").read_text())
    text = raw.pop("text_config")
    rope = text.pop("rope_parameters")
    flat = {key: value for key, value in text.items() if key not in ("model_type", "layer_types")}
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    (folder / "config.json").write_text(
        json.dumps({**flat, **raw, "rope_theta": rope["rope_theta"], "rope_scaling": scaling})
    )
    old = LanguageModelFolder.open(folder)
    assert new.model_class is old.model_class is Qwen2_5_VL and old.config == new.config


def test_published_shapes_load_with_nothing_missing_or_left_over() -> None:
    raw = {**PUBLISHED}
    with torch.device("meta"):
        ours: Any = Qwen2_5_VL(Qwen2_5_VL.read_config(raw, "config.json"))
        theirs: Any = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**raw))
    shapes = {name: parameter.shape for name, parameter in ours.named_parameters()}
    rows: dict[str, int] = {}
    for name, tensor in theirs.state_dict().items():
        target = ours.locate(name)
        rows[target.parameter] = rows.get(target.parameter, 0) + tensor.shape[0]
        assert tensor.shape[1:] == shapes[target.parameter][1:], name
    assert rows == {name: shape[0] for name, shape in shapes.items()}


def test_a_folder_that_says_nothing_of_pictures_is_for_text_alone(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()
    model = LanguageModelFolder.open(folder)
    assert model.model_class is Qwen2_5_VLText
    spec = make_spec(make_stage(folder, chat_template=True))
    assert not spec.input_media and "prompt_positions" not in spec.signature.outputs
    with pytest.raises(ConfigError, match=r"reads_media: got True, but .* no settings of its processors"):
        LanguageModelFolder.open(folder, reads_media=True)


def test_a_folder_without_the_tower_is_for_text_alone(folder: Path) -> None:
    kept = {name: tensor for name, tensor in weights(folder).items() if "visual." not in name}
    save_file(kept, folder / "model.safetensors")
    assert LanguageModelFolder.open(folder).model_class is Qwen2_5_VLText
    with pytest.raises(ConfigError, match=r"reads_media: got True, but .* no weights whose names begin with visual\."):
        LanguageModelFolder.open(folder, reads_media=True)


def test_the_tower_is_counted_and_loaded_only_where_it_is_used(folder: Path) -> None:
    seeing, blind = LanguageModelFolder.open(folder), LanguageModelFolder.open(folder, reads_media=False)
    tower = sum(tensor.numel() for name, tensor in weights(folder).items() if "visual." in name)
    assert seeing.weights_bytes(4) - blind.weights_bytes(4) == 4 * tower > 0
    loaded: Any = blind.load(CPU, torch.float32)
    assert sum(p.numel() for p in loaded.parameters()) * 4 == blind.weights_bytes(4)
    plans = [make_spec(make_stage(folder, chat_template=True, reads_media=it)).plan_memory() for it in (None, False)]
    assert plans[0].weights_bytes - plans[1].weights_bytes == 4 * tower
    assert seeing.key != blind.key, "they share no weights"


def test_a_model_of_text_alone_refuses_to_read_media(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "words")
    with pytest.raises(ConfigError, match="reads_media: got True, but Qwen3ForCausalLM reads text alone"):
        make_spec(make_stage(folder, reads_media=True))


def test_computed_buffers_are_those_of_the_reference(folder: Path) -> None:
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).model.visual
    ours: Any = LanguageModelFolder.open(folder).load(CPU, torch.bfloat16)
    expected, found = dict(theirs.named_buffers()), dict(ours.tower.encoder.named_buffers())
    assert set(found) == set(expected) and len(found) == 2
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


@pytest.mark.parametrize(
    ("key", "change", "complaint"),
    [
        ("vision_config", {"out_hidden_size": 31}, "vision_config: gives rows of 31, expected 32"),
        ("vision_config", {"depth": "deep"}, "vision_config cannot be read"),
        ("text_config", {"rope_parameters": {"mrope_section": [2, 3, 4], "rope_theta": 1e4}}, "expected three counts"),
    ],
)
def test_a_wrong_configuration_names_its_key(key: str, change: dict[str, Any], complaint: str, folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", **{key: {**raw[key], **change}})
    with pytest.raises(ConfigError, match=complaint):
        LanguageModelFolder.open(folder).load(CPU, torch.float32)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"image_token_id": -1}, "image_token_id: got -1"),
        ({"vision_config": {"patch_size": 4, "tokens_per_second": 0}}, "tokens_per_second: got 0"),
    ],
)
def test_wrong_numbers_of_prompts_are_named(change: dict[str, Any], complaint: str, folder: Path) -> None:
    edit_json(folder / "config.json", **change)
    with pytest.raises(ConfigError, match=complaint):
        Qwen2_5_VL.prompt_reader(folder, lambda chat: [], LimitsConfig())


def test_text_behind_a_video_follows_its_largest_position(folder: Path) -> None:
    """As the paper says. transformers (5.24) counts the height and width of a video alone, so that the text behind a
    long one has positions of the video.
    """
    frames = np.stack([picture(8, 16, seed) for seed in range(12)])
    spec = make_spec(make_stage(folder, chat_template=True))
    planned: Any = spec.check(OmniRequest(prompt=user(frames, "?")), SamplingParams(), ReadPorts())
    prompt = spec.input.read(planned, SamplingParams(), lambda: None).media
    places = prompt.items[0].indices
    start, steps = int(places[0]), torch.arange(6).repeat_interleave(2) * 2  # two tokens a second, a step a second
    assert prompt.positions[0, places].tolist() == (start + steps).tolist()
    assert prompt.positions[:, int(places[-1]) + 1].tolist() == [start + 11] * 3


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        (user(*[picture(8, 8)] * 3), "messages: got 3 images, expected at most 2"),
        (user(picture(400, 400)), "got 400x400 pixels, expected at most 90000"),
        (user(picture(8, 1700)), "expected sides that differ at most 200 times"),
        ([{"role": "user", "content": [{"type": "audio", "audio": b""}]}], "got audio, expected text, image or video"),
        (user("<|image_pad|>", picture(8, 8)), "take the placeholders out of the texts"),
        (user("<|image_pad|>"), "got the token id 101, which stands for media"),
        (user(picture(256, 256)), "got 1[0-9]{3} tokens with their media, expected at most 199"),
    ],
)
def test_limits_are_checked_before_anything_is_decoded(messages: Any, complaint: str, folder: Path) -> None:
    limits = LimitsConfig(max_images=2, max_image_pixels=90_000)
    spec = make_spec(make_stage(folder, chat_template=True, max_model_len=200), limits=limits)
    with pytest.raises(InvalidRequestError, match=complaint):
        spec.check(OmniRequest(prompt=messages), SamplingParams(max_tokens=1), ReadPorts())


def test_a_resized_picture_differs_by_no_more_than_a_grey_level(folder: Path) -> None:
    spec = make_spec(make_stage(folder, chat_template=True))
    for size in ((30, 50), (11, 9)):
        planned: Any = spec.check(OmniRequest(prompt=user(picture(*size))), SamplingParams(), ReadPorts())
        prompt = spec.input.read(planned, SamplingParams(), lambda: None).media
        expected = vl_processor(folder).image_processor([picture(*size)], return_tensors="pt")
        assert torch.equal(prompt.items[0].inputs["grid_thw"], expected["image_grid_thw"][0])
        difference = (prompt.items[0].inputs["pixel_values"] - expected["pixel_values"]).abs().max()
        assert difference <= 1.001 / 255 / 0.26


@pytest.mark.parametrize("most", [64, 700, 1200, 100_000])
def test_a_message_may_say_how_many_pixels_of_a_picture_are_seen(most: int, folder: Path) -> None:
    spec = make_spec(make_stage(folder, chat_template=True))
    messages = user(picture(30, 50))
    messages[0]["content"][0]["max_pixels"] = most
    planned: Any = spec.check(OmniRequest(prompt=messages), SamplingParams(), ReadPorts())
    prompt = spec.input.read(planned, SamplingParams(), lambda: None).media
    size = {"shortest_edge": 64, "longest_edge": most}
    expected = vl_processor(folder).image_processor([picture(30, 50)], return_tensors="pt", size=size)
    assert torch.equal(prompt.items[0].inputs["grid_thw"], expected["image_grid_thw"][0])
    assert len(prompt.token_ids) == planned.num_tokens


def test_a_number_of_pixels_that_is_none_is_named(folder: Path) -> None:
    spec = make_spec(make_stage(folder, chat_template=True))
    for bad in (0, 0.5, "1"):
        messages = user(picture(30, 50))
        messages[0]["content"][0]["max_pixels"] = bad
        with pytest.raises(InvalidRequestError, match=r"content\[0\]\.max_pixels: got"):
            spec.check(OmniRequest(prompt=messages), SamplingParams(), ReadPorts())


def test_omni_answers_about_a_picture_of_a_folder_without_a_config(folder: Path) -> None:
    assert config_for_model(folder).stem == "language_model"
    messages = user("See ", picture(24, 40), " what?")
    expected = Reference(folder).write(messages, 6)[0]
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    with Omni(model=str(folder), device="cpu", dtype="float32", progress=False) as omni:
        (output,) = omni.generate([{"messages": messages}], params)
    assert list(output.completions[0].token_ids) == expected
