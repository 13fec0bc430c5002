"""Prompts in a template of the stage's own, the states of its first tokens dropped, against Qwen-Image's pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageEditPlusPipeline, QwenImagePipeline
from support.ar import (
    done,
    drain,
    make_encoder,
    make_engine,
    make_model_folder,
    make_spec,
    make_stage,
    make_task,
    make_tokenizer,
    run,
    states_of,
    submit,
)
from support.language_models import TINY, save_random_model
from torch import Tensor
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from vllm_omni.engine.ar.engine import AREngine
from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.messages import StageRows

MAX_TOKENS = 300
LONG = "the end of the world " * 60
PROMPTS = ["", "a", "a red circle left of a blue square", "你好 {name} {} {{0}}"]


def encoder_config() -> Qwen2_5_VLConfig:
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 32, "fullatt_block_indexes": [0]}
    rope = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 1, 1]}
    text = {**TINY, "rope_parameters": rope, "max_position_embeddings": 1024}
    return Qwen2_5_VLConfig(text_config=text, vision_config={**vision, "intermediate_size": 32})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ar") / "model"
    save_random_model(Qwen2_5_VLForConditionalGeneration, encoder_config(), path)
    make_tokenizer().save_pretrained(path)
    return path


def make_pipeline(folder: Path, kind: Any) -> Any:
    """The pipeline with what encodes prompts alone, and the limit of these tests."""
    tokenizer = make_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval().requires_grad_(False)
    parts = {"scheduler": None, "vae": None, "transformer": None, "text_encoder": encoder, "tokenizer": tokenizer}
    if kind is QwenImageEditPlusPipeline:
        parts["processor"] = None
    pipeline = kind(**parts)
    pipeline.processor = lambda text, images, **options: tokenizer(text, **options)  # what it does without pictures
    pipeline.tokenizer_max_length = MAX_TOKENS
    return pipeline


def make_wrapping(folder: Path, pipeline: Any, **options: Any) -> AREngine:
    """The stage of a pipeline."""
    template = {"text": pipeline.prompt_template_encode, "drop_tokens": pipeline.prompt_template_encode_start_idx}
    keys = {"outputs": {"h": {"layers": [-1]}}, "max_prompt_tokens": MAX_TOKENS, "truncate_prompt": True}
    return make_encoder(folder, **{"prompt_template": template, **keys, **options})


def published(pipeline: Any, prompt: str) -> Tensor:
    embeds, mask = pipeline.encode_prompt(prompt=prompt)
    assert mask is None
    return embeds[0]


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [QwenImagePipeline, QwenImageEditPlusPipeline])
def test_states_equal_the_pipelines_own_embeddings(folder: Path, kind: Any) -> None:
    """Without pictures. The edit pipeline cuts nothing."""
    pipeline = make_pipeline(folder, kind)
    engine = make_wrapping(folder, pipeline, max_num_batched_tokens=50)
    prompts = PROMPTS if kind is QwenImageEditPlusPipeline else [*PROMPTS, LONG]
    ended = run(engine, *(make_task(prompt, request_id=str(index)) for index, prompt in enumerate(prompts)))
    for index, prompt in enumerate(prompts):
        assert_close(states_of(ended[str(index)]), published(pipeline, prompt))
    truncated = done(ended[str(len(prompts) - 1)]).metrics.get("truncated_tokens", 0)
    assert (truncated > 0) == (kind is QwenImagePipeline)


def test_the_states_of_the_template_are_computed_once(folder: Path) -> None:
    pipeline = make_pipeline(folder, QwenImagePipeline)
    engine = make_wrapping(folder, pipeline)
    run(engine, make_task("a"))
    second = done(run(engine, make_task("b"))["r"])
    num_head = len(make_tokenizer()(pipeline.prompt_template_encode.partition("{}")[0])["input_ids"])
    assert second.metrics["cached_tokens"] == num_head // 4 * 4  # all of its whole blocks
    assert_close(states_of(run(engine, make_task("b"))["r"]), published(pipeline, "b"))


def test_rows_are_streamed_without_those_that_are_dropped(folder: Path) -> None:
    pipeline = make_pipeline(folder, QwenImagePipeline)
    template = {"text": pipeline.prompt_template_encode, "drop_tokens": 34}
    keys = {"task": "encode", "outputs": {"h": {"layers": [-1]}}, "prompt_template": template}
    engine = make_engine(folder, streamed=["h"], max_num_batched_tokens=30, **keys)
    submit(engine, make_task(PROMPTS[2]))
    rows = [event for event in drain(engine) if isinstance(event, StageRows)]
    assert len(rows[0].rows) == 2 * 30 - 34 and rows[-1].is_last
    assert_close(torch.cat([event.rows for event in rows]), published(pipeline, PROMPTS[2]))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("ar") / "plain")


WRAPPED = {"prompt_template": {"text": "<|im_start|>say {x} {}!", "drop_tokens": 3}, "truncate_prompt": False}


def test_a_message_of_the_user_is_its_words_and_token_ids_are_the_whole(plain: Path) -> None:
    engine = make_encoder(plain, **WRAPPED)
    words = states_of(run(engine, make_task("{} of {x}"))["r"])
    message = {"role": "user", "content": [{"type": "text", "text": "{} of {x}"}]}
    ids = make_tokenizer()("<|im_start|>say {x} {} of {x}!")["input_ids"]
    for prompt in ([message], ids):
        assert torch.equal(states_of(run(engine, make_task(prompt))["r"]), words)
    assert len(words) == len(ids) - 3
    unwrapped = states_of(run(make_encoder(plain), make_task(ids))["r"])
    torch.testing.assert_close(words, unwrapped[3:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([1, 2, 3], "got 3 tokens, expected more than the 3 that the stage drops"),
        ([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], r"got the roles \['system', 'user'\]"),
        ([{"role": "assistant", "content": "a"}], "expected one message of the role 'user'"),
        ("a " * 300, r"expected at most 43 \(max_prompt_tokens\)"),
    ],
)
def test_what_cannot_be_wrapped_is_refused(plain: Path, prompt: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        run(make_encoder(plain, max_prompt_tokens=40, **WRAPPED), make_task(prompt))


@pytest.mark.parametrize("side", ["left", "middle", "right"])
def test_a_side_of_the_words_is_cut_and_the_template_stays(plain: Path, side: str) -> None:
    words = "ZXQJVK" * 20
    engine = make_encoder(plain, max_prompt_tokens=40, **{**WRAPPED, "truncate_prompt": side})
    ended = done(run(engine, make_task(words))["r"])
    assert ended.payload.meta["truncated_tokens"] > 0
    tokenize = make_tokenizer()
    room = 43 - len(tokenize("<|im_start|>say {x} !")["input_ids"])
    half = -(-room // 2)
    kept = {"left": words[-room:], "middle": words[:half] + words[half - room :], "right": words[:room]}[side]
    whole = tokenize(f"<|im_start|>say {{x}} {kept}!")["input_ids"]
    expected = states_of(run(make_encoder(plain), make_task(whole))["r"])[3:]
    torch.testing.assert_close(states_of(ended), expected, rtol=1e-5, atol=1e-5)
    assert len(expected) == 40


def test_rows_are_padded_behind_what_is_dropped(plain: Path) -> None:
    engine = make_encoder(plain, pad_prompt_to=40, **WRAPPED)
    rows = states_of(run(engine, make_task("a"))["r"])
    valid = states_of(run(make_encoder(plain, **WRAPPED), make_task("a"))["r"])
    assert len(rows) == 40 > len(valid)
    torch.testing.assert_close(rows[: len(valid)], valid, rtol=1e-5, atol=1e-5)


def test_keys_of_a_chat_are_not_read(plain: Path) -> None:
    spec = make_spec(make_stage(plain, task="encode", outputs={"h": {"layers": [1]}}, **WRAPPED))
    assert spec.request_keys == {"truncate_prompt"}
    assert "the states of its first 3 tokens dropped" in spec.note()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"prompt_template": {"text": "no place"}},
            r"template.text: got 'no place' with 0 of \{\}, expected one",
        ),
        ({"prompt_template": {"text": "{} and {}"}}, r"prompt_template.text: got .* with 2 of \{\}"),
        ({"prompt_template": {"text": "a {}", "drop_tokens": -1}}, "prompt_template.drop_tokens: got -1"),
        ({"prompt_template": {"text": "a{}", "drop_tokens": 9}}, "got 9, expected at most 1, the template's tokens"),
        ({"task": "generate"}, "prompt_template: got it with task generate"),
        ({"system_prompt": "x"}, "system_prompt: got it with prompt_template"),
        ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs: got it with prompt_template"),
    ],
)
def test_what_makes_no_template_is_refused_at_load(plain: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_spec(make_stage(plain, **{"task": "encode", "outputs": {"h": {"layers": [1]}}, **WRAPPED, **options}))
