"""Encode stages whose template holds the pictures of a request, against the pipelines of Qwen-Image-Edit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from support.ar import assert_clean, done, failed, load, make_spec, make_stage, submit
from support.ar import drain as finish
from support.media import picture
from support.seeing import IMAGE, save_tiny_vl, vl_processor
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.engine.ar.engine import AREngine
from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.messages import StageDone, StageTask
from vllm_omni.params import DiffusionParams, SamplingParams
from vllm_omni.request import OmniRequest
from vllm_omni.worker.model_pool import ModelPool

PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
PATCH = 16  # so that a token covers 32 pixels, and no picture of such sides is resized again
SIZES = [(90, 130), (64, 64), (300, 100)]
PICTURES = [Image.fromarray(picture(*size, seed)) for seed, size in enumerate(SIZES)]
OUTPUTS = {"h": {"layers": [-1]}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As diffusers lays it out: text_encoder, and processor beside it."""
    whole = tmp_path_factory.mktemp("edit")
    return save_tiny_vl(whole / "text_encoder", patch_size=PATCH, processor="../processor")


@pytest.fixture(scope="module")
def plus(folder: Path) -> QwenImageEditPlusPipeline:
    return made(QwenImageEditPlusPipeline, folder)


@pytest.fixture(scope="module")
def pool() -> ModelPool:
    return ModelPool()


def made(kind: Any, folder: Path) -> Any:
    """The pipeline with what encodes prompts alone. It does not tell its text encoder which tokens are pictures, which
    transformers 5 needs to be told for the positions that the model was trained with (diffusers#14194), so that a hook
    does.
    """
    processor = vl_processor(folder.parent / "processor")
    encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()

    def with_kinds(_: Any, args: Any, keys: dict[str, Any]) -> Any:
        return args, {**keys, "mm_token_type_ids": (keys["input_ids"] == IMAGE).int()}

    encoder.register_forward_pre_hook(with_kinds, with_kwargs=True)
    parts = dict.fromkeys(("scheduler", "vae", "transformer"))
    return kind(**parts, text_encoder=encoder, tokenizer=processor.tokenizer, processor=processor)


def expected_plus(pipeline: QwenImageEditPlusPipeline, words: str, pictures: list[Image.Image]) -> Tensor:
    """[T, D]: as its `__call__` prepares pictures and encodes them."""
    resized = []
    for one in pictures:
        width, height = pipeline_qwenimage_edit_plus.calculate_dimensions(
            pipeline_qwenimage_edit_plus.CONDITION_IMAGE_SIZE, one.width / one.height
        )
        resized.append(pipeline.image_processor.resize(one, height, width))
    with torch.no_grad():
        embeds, _ = pipeline.encode_prompt(words, resized)
    return embeds[0]


def template_of(pipeline: Any, **images: Any) -> dict[str, Any]:
    return {
        "text": pipeline.prompt_template_encode,
        "drop_tokens": pipeline.prompt_template_encode_start_idx,
        "images": images,
    }


def engine_of(
    folder: Path, pool: ModelPool, template: Any, limits: LimitsConfig | None = None, **keys: Any
) -> AREngine:
    stage = make_stage(folder, task="encode", outputs=OUTPUTS, prompt_template=template, **keys)
    return load(make_spec(stage, limits=limits), whole=["h"], models=pool)


def plus_template(pipeline: Any) -> dict[str, Any]:
    return template_of(pipeline, text=f"Picture {{}}: {PICTURE}", area=384 * 384, multiple=32)


def encode(engine: AREngine, *requests: OmniRequest) -> list[Any]:
    submit(engine, *(StageTask(request, "text", SamplingParams(), {}) for request in requests))
    events = {event.request_id: event for event in finish(engine) if not hasattr(event, "num_done")}
    return [events[request.request_id] for request in requests]


def states(event: Any) -> Tensor:
    found: Tensor = done(event).payload.tensors["h"]
    return found


@pytest.mark.parametrize("keys", [{}, {"max_num_batched_tokens": 50}, {"prefix_caching": False, "block_size": 16}])
def test_states_equal_the_pipelines_in_one_batch(
    keys: dict[str, Any], folder: Path, pool: ModelPool, plus: QwenImageEditPlusPipeline
) -> None:
    engine = engine_of(folder, pool, plus_template(plus), **keys)
    cases = {"Make it red": PICTURES[:1], "Join {them}": PICTURES, "Turn": PICTURES[1:][::-1]}
    requests = [OmniRequest(prompt=words, fields={"image": pictures}) for words, pictures in cases.items()]
    for event, (words, pictures) in zip(encode(engine, *requests), cases.items(), strict=True):
        torch.testing.assert_close(states(event), expected_plus(plus, words, pictures), rtol=1e-4, atol=1e-4)
    assert_clean(engine)


def test_negative_prompts_see_the_pictures_too(folder: Path, pool: ModelPool, plus: QwenImageEditPlusPipeline) -> None:
    engine = engine_of(folder, pool, plus_template(plus), prompt="negative_prompt")
    params = DiffusionParams(image=PICTURES[:2], negative_prompt="blurry")
    empty = DiffusionParams(image=PICTURES[0])
    found = encode(engine, OmniRequest(prompt="Paint", params=params), OmniRequest(prompt="Paint", params=empty))
    torch.testing.assert_close(states(found[0]), expected_plus(plus, "blurry", PICTURES[:2]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(states(found[1]), expected_plus(plus, "", PICTURES[:1]), rtol=1e-4, atol=1e-4)


def test_pictures_of_a_message_stand_where_they_are(
    folder: Path, pool: ModelPool, plus: QwenImageEditPlusPipeline
) -> None:
    engine = engine_of(folder, pool, plus_template(plus))
    parts = [{"type": "image", "image": PICTURES[1]}, {"type": "text", "text": "Turn"}]
    request = OmniRequest(prompt=[{"role": "user", "content": parts}], fields={"image": PICTURES[0]})
    expected = expected_plus(plus, "Turn", PICTURES[:2])
    torch.testing.assert_close(states(encode(engine, request)[0]), expected, rtol=1e-4, atol=1e-4)


def test_words_alone_need_no_picture(folder: Path, pool: ModelPool, plus: QwenImageEditPlusPipeline) -> None:
    engine = engine_of(folder, pool, plus_template(plus))
    with torch.no_grad():
        inputs = plus.processor(text=[plus.prompt_template_encode.format("A cat")], return_tensors="pt")
        ids = inputs["input_ids"]
        expected = plus.text_encoder(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, 64:]
    torch.testing.assert_close(states(encode(engine, OmniRequest(prompt="A cat"))[0]), expected, rtol=1e-4, atol=1e-4)


def test_the_older_pipeline_is_the_same_with_another_text_and_area(folder: Path, pool: ModelPool) -> None:
    pipeline = made(QwenImageEditPipeline, folder)
    text = pipeline.prompt_template_encode.replace(PICTURE, "")
    template = {**template_of(pipeline, text=PICTURE, area=1024 * 1024, multiple=32), "text": text}
    width, height, _ = pipeline_qwenimage_edit.calculate_dimensions(1024 * 1024, 130 / 90)
    resized = pipeline.image_processor.resize(PICTURES[0], height, width)
    with torch.no_grad():
        expected = pipeline.encode_prompt("Make it red", resized)[0][0]
    engine = engine_of(folder, pool, template)
    found = encode(engine, OmniRequest(prompt="Make it red", fields={"image": PICTURES[0]}))[0]
    torch.testing.assert_close(states(found), expected, rtol=1e-4, atol=1e-4)


def test_another_picture_under_the_same_words_is_another_prompt(
    folder: Path, pool: ModelPool, plus: QwenImageEditPlusPipeline
) -> None:
    engine = engine_of(folder, pool, plus_template(plus))
    requests = [OmniRequest(prompt="Turn", fields={"image": PICTURES[index]}) for index in (0, 1, 0)]
    events = [encode(engine, request)[0] for request in requests]
    hits = [event.metrics["cache_hits"] for event in events]
    assert hits[0] == 0 and hits[1] < 400 < hits[2]
    assert torch.equal(states(events[0]), states(events[2]))


def test_a_payload_is_reused_for_words_alone(folder: Path, plus: QwenImageEditPlusPipeline) -> None:
    stage = make_stage(folder, task="encode", outputs=OUTPUTS, prompt_template=plus_template(plus))
    spec = make_spec(stage)
    tasks = [
        StageTask(OmniRequest(prompt="Turn", fields=fields), "text", SamplingParams(), {})
        for fields in ({}, {"image": PICTURES[0]})
    ]
    keys = [spec.cache_key(task) for task in tasks]
    assert keys[0] is not None and keys[1] is None


@pytest.mark.parametrize(
    ("prompt", "image", "complaint"),
    [
        ("Turn", [picture(8, 8)] * 3, "image: got 3 images, expected at most 2"),
        ("Turn", picture(200, 200), "image: got 200x200 pixels, expected at most 30000"),
        ("Turn", [picture(8, 8), 3], r"image\[1\]: got int, expected a path"),
        ("Turn", b"none", "image: got a file that is no whole image"),
        ([1, 2, 3], picture(8, 8), "prompt: got token ids with `image`, expected words"),
        (f"{PICTURE} Turn", picture(8, 8), "take the placeholders out"),
        (PICTURE, None, "stands for media"),
    ],
)
def test_what_cannot_be_read_is_refused_before_it_is_decoded(
    prompt: Any, image: Any, complaint: str, folder: Path, pool: ModelPool, plus: QwenImageEditPlusPipeline
) -> None:
    engine = engine_of(folder, pool, plus_template(plus), LimitsConfig(max_images=2, max_image_pixels=30_000))
    with pytest.raises(InvalidRequestError, match=complaint):
        encode(engine, OmniRequest(prompt=prompt, fields={"image": image}))


def test_a_damaged_picture_fails_its_request_alone(
    folder: Path, pool: ModelPool, plus: QwenImageEditPlusPipeline, tmp_path: Path
) -> None:
    PICTURES[0].save(tmp_path / "whole.png")
    damaged = (tmp_path / "whole.png").read_bytes()[:-200]
    engine = engine_of(folder, pool, plus_template(plus))
    requests = [OmniRequest(prompt="Turn", fields={"image": image}) for image in (damaged, str(tmp_path / "whole.png"))]
    bad, good = encode(engine, *requests)
    assert "image: got an image that is damaged" in failed(bad, InvalidRequestError)
    assert isinstance(good, StageDone)
    assert_clean(engine)


def test_a_stage_says_which_keys_of_a_request_hold_pictures(folder: Path, plus: QwenImageEditPlusPipeline) -> None:
    keys = {"task": "encode", "outputs": OUTPUTS}
    seeing = make_spec(make_stage(folder, prompt_template=plus_template(plus), **keys))
    assert "image" in seeing.request_keys and "image" in seeing.media_keys
    blind = make_spec(make_stage(folder, **keys))
    assert "image" not in blind.request_keys and not blind.media_keys


@pytest.mark.parametrize(
    ("images", "complaint"),
    [
        ({"text": ""}, "text: got ''"),
        ({"text": "{} {}"}, "at most one {}"),
        ({"text": PICTURE, "area": 0}, "area: got 0"),
        ({"text": PICTURE, "area": 9, "multiple": 0}, "multiple: got 0"),
    ],
)
def test_wrong_keys_are_named(images: dict[str, Any], complaint: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make_stage(folder, task="encode", outputs=OUTPUTS, prompt_template={"text": "{}", "images": images})


def test_pictures_in_a_template_need_a_model_that_sees(folder: Path) -> None:
    template = {"text": "{}", "images": {"text": PICTURE}}
    stage = make_stage(folder, task="encode", outputs=OUTPUTS, prompt_template=template, reads_media=False)
    with pytest.raises(ConfigError, match=r"prompt_template\.images: got it, but the model in .* reads text alone"):
        make_spec(stage)
