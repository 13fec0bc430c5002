"""Prompts padded to a number of rows, against FLUX.2-klein's own function over transformers: pads see the prompt and
stand at positions of their own, and nothing sees them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline
from support.ar import (
    assert_clean,
    done,
    drain,
    edit_json,
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
from torch import Tensor
from transformers import Qwen3ForCausalLM

from vllm_omni.engine.ar.engine import AREngine
from vllm_omni.errors import ConfigError, InvalidRequestError, ResourceError
from vllm_omni.layers.native.library import built_variants
from vllm_omni.messages import StageDone, StageRows

LAYERS = [1, 2, 3]
ROWS = 40
WORDS = "a red circle left of a blue square"
PROMPTS = ["", "a", WORDS, "你好 你好", "the end of the world " * 12]  # the last fills the rows, and is cut
OPTIONS: dict[str, Any] = {
    "outputs": {"h": {"layers": LAYERS}},
    "chat_template": True,
    "chat_template_kwargs": {"enable_thinking": False},
    "truncate_prompt": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {"num_hidden_layers": 4, "max_position_embeddings": 1024, "scale": 0.1}
    return make_model_folder(tmp_path_factory.mktemp("ar") / "model", **config)


def published(folder: Path, prompts: list[str], rows: int = ROWS) -> Tensor:
    """[prompts, rows, layers D], all in one batch."""
    model = Qwen3ForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return Flux2KleinPipeline._get_qwen3_prompt_embeds(
            model, make_tokenizer(), prompts, max_sequence_length=rows, hidden_states_layers=LAYERS
        )


def make_padding(folder: Path, rows: int = ROWS, **options: Any) -> AREngine:
    return make_encoder(folder, **{**OPTIONS, "pad_prompt_to": rows, **options})


def rows_of(engine: AREngine, prompts: list[Any]) -> list[Tensor]:
    ended = run(engine, *(make_task(prompt, request_id=str(index)) for index, prompt in enumerate(prompts)))
    assert_clean(engine)
    return [states_of(ended[str(index)]) for index in range(len(prompts))]


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["reference", "sdpa", "native"])
@pytest.mark.parametrize("max_num_batched_tokens", [2048, 3])
def test_every_row_equals_transformers_also_from_the_prefix_cache(
    folder: Path, attention: str, max_num_batched_tokens: int
) -> None:
    if attention == "native" and not built_variants():
        pytest.skip("no kernels are built")
    engine = make_padding(folder, attention=attention, max_num_batched_tokens=max_num_batched_tokens)
    expected = published(folder, PROMPTS)
    for states in (rows_of(engine, PROMPTS), rows_of(engine, PROMPTS)):
        for ours, theirs in zip(states, expected, strict=True):
            assert_close(ours, theirs)
    again = done(run(engine, make_task(WORDS))["r"])
    assert again.metrics["cached_tokens"] == again.metrics["prompt_tokens"] < ROWS  # pads are served, and not counted


def test_512_rows_equal_transformers(folder: Path) -> None:
    prompts = [WORDS, "the end of the world " * 200]
    for ours, theirs in zip(rows_of(make_padding(folder, 512), prompts), published(folder, prompts, 512), strict=True):
        assert ours.shape == (512, len(LAYERS) * 32)
        assert_close(ours, theirs)


def test_rows_are_the_same_alone_and_in_a_crowd(folder: Path) -> None:
    alone = [rows_of(make_padding(folder), [prompt])[0] for prompt in PROMPTS]
    for options in ({}, {"max_num_batched_tokens": 1}, {"num_blocks": 15, "max_num_batched_tokens": 24}):
        engine = make_padding(folder, **options)
        for ours, theirs in zip(rows_of(engine, PROMPTS), alone, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_preempted_prompt_gives_the_same_rows(folder: Path) -> None:
    """Two that grow by turns in a pool for one and a half of them; the second gives way among its pads."""
    engine = make_padding(folder, num_blocks=15, max_num_batched_tokens=6, prefix_caching=False)
    submit(engine, make_task(WORDS, request_id="first"))
    engine.step()
    engine.pause("first")
    submit(engine, make_task("a", request_id="second"))
    for _ in range(5):
        engine.step()
    engine.resume("first")
    ended = {event.request_id: event for event in drain(engine) if isinstance(event, StageDone)}
    for name, theirs in zip(("first", "second"), published(folder, [WORDS, "a"]), strict=True):
        assert_close(states_of(ended[name]), theirs)
    assert engine.get_stats()["num_preemptions"] > 0
    assert_clean(engine)


def test_pads_are_not_taken_for_pad_tokens_of_a_prompt(folder: Path) -> None:
    """A prompt that goes on with the pad token is another one, in either order."""
    short, pad = [5, 6, 7, 8, 9], 0
    long = [*short, *[pad] * 20]
    fresh = {len(ids): rows_of(make_padding(folder), [ids])[0] for ids in (short, long)}
    assert not torch.allclose(fresh[len(short)][24], fresh[len(long)][24])
    for order in ([short, long], [long, short]):
        engine = make_padding(folder)
        for ids in order:
            torch.testing.assert_close(rows_of(engine, [ids])[0], fresh[len(ids)], rtol=1e-5, atol=1e-5)


def test_rows_are_streamed_as_they_are_computed(folder: Path) -> None:
    keys = {**OPTIONS, "task": "encode", "pad_prompt_to": ROWS, "max_num_batched_tokens": 9}
    engine = make_engine(folder, streamed=["h"], **keys)
    submit(engine, make_task(WORDS))
    rows = [event for event in drain(engine) if isinstance(event, StageRows)]
    assert len(rows) == 5 and [event.is_last for event in rows] == [False] * 4 + [True]
    assert_close(torch.cat([event.rows for event in rows]), published(folder, [WORDS])[0])


def test_an_abort_among_the_pads_leaves_nothing(folder: Path) -> None:
    engine = make_padding(folder, max_num_batched_tokens=8)
    submit(engine, make_task("a", request_id="gone"), make_task(WORDS, request_id="stays"))
    for _ in range(4):
        engine.step()
        engine.check_integrity()
    engine.abort("gone")
    events = {event.request_id: event for event in drain(engine) if isinstance(event, StageDone)}
    assert set(events) == {"stays"}
    assert_close(states_of(events["stays"]), published(folder, [WORDS])[0])
    assert_clean(engine)


def test_a_prompt_that_is_longer_is_refused_where_it_may_not_be_cut(folder: Path) -> None:
    engine = make_padding(folder, truncate_prompt=False)
    with pytest.raises(InvalidRequestError, match=r"got \d+ tokens, expected at most 40 \(pad_prompt_to\)"):
        run(engine, make_task(PROMPTS[-1]))


def test_a_pool_that_is_too_small_for_the_pads_is_said(folder: Path) -> None:
    with pytest.raises(ResourceError, match=r"got 40 tokens .* at most 36"):
        run(make_padding(folder, num_blocks=9), make_task("a"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "generate"}, "pad_prompt_to: got it with task generate, expected task encode"),
        ({"pad_prompt_to": 0}, "pad_prompt_to: got 0"),
        ({"max_prompt_tokens": 41}, r"max_prompt_tokens: got 41, expected at most pad_prompt_to \(40\)"),
        ({"max_model_len": 39}, r"pad_prompt_to: got prompts of 40 tokens .* at most 39 \(max_model_len\)"),
    ],
)
def test_what_cannot_be_padded_is_refused_at_load(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_spec(make_stage(folder, **{**OPTIONS, "task": "encode", "pad_prompt_to": ROWS, **options}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_sliding_window": True, "sliding_window": 39, "max_window_layers": 2}, "at most 39, a window"),
        (
            {
                "max_position_embeddings": 32,
                "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
            },
            "at most 32, beyond which",
        ),
    ],
)
def test_a_model_that_would_see_pads_otherwise_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    model = make_model_folder(tmp_path / "model", **changes)
    stage = make_stage(model, task="encode", outputs={"h": {"layers": [1]}}, pad_prompt_to=ROWS)
    with pytest.raises(ConfigError, match=message):
        make_spec(stage)


@pytest.mark.parametrize("pad_token", [None, "<|99|>"])
def test_a_tokenizer_without_a_pad_token_of_the_model_is_refused(tmp_path: Path, pad_token: str | None) -> None:
    model = make_model_folder(tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<|{number}|>" for number in range(100)])  # beyond the vocabulary
    tokenizer.save_pretrained(model)
    edit_json(model / "tokenizer_config.json", pad_token=pad_token)
    stage = make_stage(model, task="encode", outputs={"h": {"layers": [1]}}, pad_prompt_to=ROWS)
    with pytest.raises(ConfigError, match=r"pad_prompt_to: got the pad token .* expected one below 320"):
        make_spec(stage)


def test_check_says_what_is_padded(folder: Path) -> None:
    spec = make_spec(make_stage(folder, **{**OPTIONS, "task": "encode", "pad_prompt_to": ROWS}))
    assert "prompts padded to 40 rows" in spec.note()
    assert spec.job_size(make_task("a").request, make_task("a").params, None) == ROWS / 10
