"""What the AR stage refuses, what it knows before it runs, and that one bad task harms no other."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ar import (
    GREEDY,
    PROMPT_STATES,
    VOCABULARY,
    WRITTEN_STATES,
    assert_clean,
    check,
    done,
    drain,
    edit_json,
    failed,
    make_encoder,
    make_engine,
    make_model_folder,
    make_options,
    make_spec,
    make_stage,
    make_task,
    run,
    states_of,
    submit,
    tokens_of,
)

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.engine.ar.options import AROptions
from vllm_omni.engine.ar.tokenizer import TextProcessor, end_of_sequence_ids
from vllm_omni.errors import ConfigError, InvalidRequestError, OmniError, ResourceError, StageError
from vllm_omni.messages import StageDone, StageFailed, StageProgress
from vllm_omni.params import DiffusionParams, SamplingParams
from vllm_omni.payload import TensorSpec, TextSpec
from vllm_omni.request import OmniRequest
from vllm_omni.worker.ar.kv_pool import DEFAULT_POOL, MAX_DEFAULT_BLOCKS
from vllm_omni.worker.model_pool import ModelPool

PROMPT = "a red circle left of a blue square"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("ar") / "model")


def test_truncation_keeps_the_first_tokens_and_is_said(folder: Path) -> None:
    ids = list(range(40, 60))
    cut = done(run(make_encoder(folder, max_prompt_tokens=6, truncate_prompt=True), make_task(ids))["r"])
    assert cut.metrics["truncated_tokens"] == cut.payload.meta["truncated_tokens"] == 14
    assert torch.equal(states_of(cut), states_of(run(make_encoder(folder), make_task(ids[:6]))["r"]))
    assert "truncated_tokens" not in done(run(make_encoder(folder), make_task(ids))["r"]).metrics


BAD_PROMPTS: list[tuple[Any, dict[str, Any], type[OmniError], str]] = [
    ("a" * 2001, {}, InvalidRequestError, "2001 characters, expected at most 2000"),
    ([{"role": "user", "content": "a" * 2001}], {}, InvalidRequestError, "2001 characters"),
    ([5] * 64, {}, InvalidRequestError, r"64 tokens, expected at most 63 \(max_model_len\)"),
    ([5, VOCABULARY], {}, InvalidRequestError, f"token id {VOCABULARY}, expected less than {VOCABULARY}"),
    ("", {}, InvalidRequestError, "no tokens"),
    ("\ud800", {}, InvalidRequestError, "not valid Unicode"),
    ([5] * 50, {}, ResourceError, "51 tokens .* expected at most 48, the whole KV pool, as num_blocks sets it"),
    ([5] * 40, {"min_tokens": 30}, InvalidRequestError, "min_tokens: got 30, expected at most 8"),
]
BAD_PARAMS: list[tuple[Any, dict[str, Any], type[OmniError], str]] = [
    ("a", {"n": 5}, InvalidRequestError, "n: got 5, expected at most 4"),
    ("a", {"logit_bias": {VOCABULARY: 1.0}}, InvalidRequestError, "logit_bias: got the token id"),
    ("a", {"stop_token_ids": [VOCABULARY]}, InvalidRequestError, "stop_token_ids: got the token id"),
    (
        "a",
        {"min_tokens": 5, "max_tokens": 4},
        InvalidRequestError,
        r"min_tokens: got 5, expected at most max_tokens \(4\)",
    ),
]
SMALL = {"max_model_len": 64, "num_blocks": 12, "limits": LimitsConfig(max_prompt_chars=2000, max_outputs=4)}


@pytest.mark.parametrize(("prompt", "params", "kind", "message"), [*BAD_PROMPTS, *BAD_PARAMS])
def test_a_bad_request_is_refused_by_check(
    folder: Path, prompt: Any, params: Any, kind: type[OmniError], message: str
) -> None:
    engine = make_engine(folder, **SMALL)
    with pytest.raises(kind, match=message):
        check(engine, OmniRequest(prompt=prompt), SamplingParams(**params))
    assert len(tokens_of(run(engine, make_task("fine", GREEDY, "good"))["good"])) == 12


@pytest.mark.parametrize(("prompt", "params", "kind", "message"), BAD_PROMPTS)
def test_a_bad_prompt_that_an_edge_brings_fails_alone(
    folder: Path, prompt: Any, params: Any, kind: type[OmniError], message: str
) -> None:
    engine = make_engine(folder, inputs={"prompt": "writer.text"}, **SMALL)
    bad = make_task("unread", SamplingParams(**params), "bad", {"prompt": prompt})
    ended = run(engine, bad, make_task("unread", GREEDY, "good", {"prompt": "fine"}))
    assert re.search(message, failed(ended["bad"], ResourceError if kind is ResourceError else StageError))
    assert len(tokens_of(ended["good"])) == 12
    assert_clean(engine)


def test_parameters_of_another_kind_are_refused(folder: Path) -> None:
    engine = make_engine(folder)
    with pytest.raises(InvalidRequestError, match="got DiffusionParams, expected SamplingParams"):
        check(engine, OmniRequest(prompt="a"), DiffusionParams())


def test_several_samples_are_refused_where_one_text_is_read(folder: Path) -> None:
    many = SamplingParams(n=2)
    request = OmniRequest(prompt="a")
    check(make_engine(folder), request, many)
    reader = make_stage(folder, name="reader", inputs={"prompt": "text.text"})
    read = make_engine(folder, wanted=["text"], readers={"reader": reader})
    with pytest.raises(InvalidRequestError, match="n: got 2, expected 1"):
        check(read, request, many, by_stages=True)
    check(read, request, many)  # the reader does not run for it
    with pytest.raises(InvalidRequestError, match="n: got 2, expected 1"):
        check(make_engine(folder, wanted=["h"], outputs=WRITTEN_STATES), request, many)
    check(make_encoder(folder), request, many)  # samples nothing; the parameters are meant for others


def test_texts_are_cut_to_the_room_there_is(folder: Path) -> None:
    by_length = run(
        make_engine(folder, max_model_len=20), make_task([5] * 15, SamplingParams(temperature=0, ignore_eos=True))
    )
    by_pool = run(
        make_engine(folder, num_blocks=4), make_task([5] * 10, SamplingParams(temperature=0, ignore_eos=True))
    )
    assert [len(tokens_of(ended["r"])) for ended in (by_length, by_pool)] == [5, 6]
    assert done(by_length["r"]).payload.meta["finish_reason"] == "length"


def test_a_task_that_fails_while_it_samples_leaves_the_others_alone(folder: Path) -> None:
    everything = list(range(VOCABULARY))
    bad = SamplingParams(temperature=0, min_tokens=3, max_tokens=5, stop_token_ids=everything, n=2)
    engine = make_engine(folder)
    alone = tokens_of(run(make_engine(folder), make_task(PROMPT, GREEDY))["r"])
    ended = run(engine, make_task("a", bad, "bad"), make_task(PROMPT, GREEDY, "good"))
    assert "min_tokens" in failed(ended["bad"], StageError)
    assert tokens_of(ended["good"]) == alone
    assert_clean(engine)


def test_a_task_whose_text_cannot_be_made_fails_alone_with_its_cause(folder: Path) -> None:
    engine = make_engine(folder)
    submit(engine, *(make_task("a", GREEDY, name) for name in ("bad", "good")))
    (broken,) = engine._jobs["bad"].samples.values()
    broken.stream._token_ids = None  # type: ignore[assignment]
    ended = {event.request_id: event for event in drain(engine) if not isinstance(event, StageProgress)}
    assert isinstance(ended["bad"], StageFailed) and isinstance(ended["bad"].error.__cause__, AttributeError)
    assert isinstance(ended["good"], StageDone)
    assert_clean(engine)


def test_the_signature_follows_the_config(folder: Path) -> None:
    outputs = {"h": {"layers": [-2]}, "all": {"layers": [0, 1, 2, 3]}}
    writer = make_spec(make_stage(folder, outputs=outputs)).signature
    assert writer.outputs == {"text": TextSpec(), "h": TensorSpec(("T", 32)), "all": TensorSpec(("T", 128))}
    assert (writer.inputs, writer.required_inputs) == ({"prompt": TextSpec()}, frozenset())
    assert writer.results == {"text"}
    reader = make_spec(make_stage(folder, task="encode", outputs=outputs)).signature
    assert set(reader.outputs) == {"h", "all"} and not reader.results
    assert writer.streamed_outputs == reader.streamed_outputs == {"h", "all"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outputs": {"h": {"layers": [4]}}}, "outputs.h.layers: got 4, expected -4 to 3"),
        ({"max_model_len": 257}, "max_model_len: got 257, expected at most 256"),
        ({"prompt": "negative_prompt", "inputs": {"prompt": "writer.text"}}, "inputs.prompt brings the prompt"),
        ({"task": "encode", "outputs": PROMPT_STATES, "defaults": {"n": 1}}, r"defaults: got \['n'\], but task encode"),
        ({"part": "thinker"}, "got part 'thinker' of Qwen3ForCausalLM, expected none; it is one model"),
    ],
)
def test_what_does_not_fit_the_model_is_an_error_of_the_spec(folder: Path, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_spec(make_stage(folder, **options))


@pytest.mark.parametrize("options", [{}, {"num_blocks": 10}, {"kv_memory_mb": 1.5}, {"task": "encode"}])
def test_the_memory_plan_is_what_is_then_held(folder: Path, options: Any) -> None:
    plan = make_spec(make_stage(folder, outputs=PROMPT_STATES, **options)).plan_memory()
    engine = make_engine(folder, wanted=["h"], outputs=PROMPT_STATES, **options)
    assert plan.kv_pool_bytes == engine.get_stats()["kv_pool_bytes"]
    assert plan.weights_bytes > 0 and plan.activation_bytes > 0
    if "kv_memory_mb" in options:
        assert 1.4 * 2**20 < plan.kv_pool_bytes <= 1.5 * 2**20


def test_the_default_pool_is_what_is_granted_and_says_so(folder: Path) -> None:
    stage = make_stage(folder, block_size=16, max_num_seqs=64)
    small, large = (make_spec(stage, grants=grants).pool for grants in (False, True))
    assert (small.num_blocks, small.num_wanted, small.limited_by) == (16, 63 * 16, DEFAULT_POOL), "one sequence"
    assert (large.num_blocks, large.num_wanted, large.limited_by) == (64 * 16, 0, "max_num_seqs")
    spec = make_spec(stage, grants=False)
    spec.grant_memory(5 * small.block_bytes + 1)
    assert spec.pool.num_blocks == 21


def test_no_default_pool_has_more_blocks_than_anyone_could_count(folder: Path) -> None:
    assert make_spec(make_stage(folder, block_size=1, max_num_seqs=10**6)).pool.num_blocks == MAX_DEFAULT_BLOCKS


def test_a_sequence_may_have_all_positions_and_a_pool_is_no_larger_than_they_need(folder: Path) -> None:
    config = dataclasses.replace(make_spec(make_stage(folder)).model.config, max_position_embeddings=20_000)
    for options in (AROptions(), AROptions(kv_memory_mb=8.0), AROptions(num_blocks=7)):
        assert options.model_len(config) == 20_000
    assert AROptions().least_len(config) == 4096 and AROptions(max_model_len=9000).least_len(config) == 9000
    pool = make_spec(make_stage(folder, kv_memory_mb=2.0**20, max_num_seqs=2)).pool
    assert (pool.num_blocks, pool.limited_by) == (2 * 64, "max_num_seqs")


def test_stages_of_one_folder_share_the_weights_and_nothing_else(folder: Path) -> None:
    pool = ModelPool()
    writer = make_engine(folder, models=pool)
    reader = make_encoder(folder, models=pool)
    assert len(pool) == 1
    make_engine(folder, models=pool, dtype="bfloat16")
    assert len(pool) == 2
    alone = run(make_encoder(folder), make_task("a"))["r"]
    run(writer, make_task("a", GREEDY))
    assert torch.equal(states_of(run(reader, make_task("a"))["r"]), states_of(alone))


def test_the_cache_key_covers_what_determines_the_states(folder: Path) -> None:
    def key(prompt: Any, params: SamplingParams | None = None, **options: Any) -> str | None:
        stage = make_stage(folder, **{"task": "encode", "outputs": PROMPT_STATES, **options})
        return make_spec(stage).cache_key(make_task(prompt, params))

    assert key("a") == key("a", SamplingParams(seed=9)) is not None
    assert make_spec(make_stage(folder)).cache_key(make_task("a")) is None
    messages = [{"role": "user", "content": "a"}]
    others = [
        key("b"),
        key([97]),
        key(messages),
        key("a", chat_template=True),
        key("a", outputs={"h": {"layers": [0]}}),
        key("a", pad_prompt_to=40),
        key("a", prompt_template={"text": "say {}"}),
        key("a", prompt_template={"text": "say {}", "drop_tokens": 1}),
    ]
    assert len({key("a"), *others}) == 9
    assert key(messages) == key([{"content": "a", "role": "user"}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "encod"}, r"task: got 'encod', expected one of 'generate', 'encode' \(did you mean 'encode'\?\)"),
        ({"task": "encode"}, "outputs: nothing"),
        ({"prompt": "system"}, "prompt: got 'system'"),
        ({"chat_template": "yes"}, "chat_template: got 'yes', expected true or false"),
        ({"outputs": {"text": {"layers": [1]}}}, "other than 'text'"),
        ({"outputs": {"h": [-2]}}, r"outputs.h: got \[-2\]"),
        ({"outputs": {"h": {"layer": [1]}}}, r"outputs.h.layer: unknown key \(did you mean 'layers'\?\)"),
        ({"outputs": {"h": {"layers": []}}}, "outputs.h.layers: got none, expected a list"),
        ({"outputs": {"h": {"layers": [1.5]}}}, r"outputs.h.layers\[0\]: got 1.5"),
        ({"outputs": {"h": {"layers": [1], "tokens": "all"}}}, "outputs.h.tokens: got 'all'"),
        ({"task": "encode", "outputs": WRITTEN_STATES}, "task encode writes nothing"),
        ({"task": "encode", "outputs": {"h": {"layers": [1], "tokens": "followed"}}}, "task encode writes nothing"),
        ({"sections": "scene"}, "sections: got 'scene', expected a list"),
        ({"sections": ["scene", "a b"]}, r"sections\[1\]: got 'a b', expected an identifier"),
        ({"sections": ["finish_reason"]}, r"sections\[0\]: got 'finish_reason', expected an identifier other than"),
        ({"sections": ["a", "a"]}, r"sections\[1\]: got 'a', which another port"),
        ({"sections": ["h"], "outputs": WRITTEN_STATES}, r"sections\[0\]: got 'h', which another port"),
        ({"sections": ["a"], "task": "encode", "outputs": PROMPT_STATES}, "sections: got some, .* writes nothing"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize: set by the stage itself"),
        ({"system_prompt": ["be kind"]}, r"system_prompt: got \['be kind'\], expected a string or null"),
        ({"attention": "sdp"}, r"attention: got 'sdp' \(did you mean 'sdpa'\?\)"),
        ({"max_num_seqs": 0}, "max_num_seqs: got 0, expected at least 1"),
        ({"block_size": None}, "block_size: got null"),
        ({"kv_memory_mb": float("nan")}, "kv_memory_mb: got nan"),
        ({"kv_memory_mb": 1.0, "num_blocks": 3}, "num_blocks: given together with kv_memory_mb"),
        ({"max_prompt_tokens": 2.5}, "max_prompt_tokens: got 2.5, expected an integer"),
    ],
)
def test_bad_options_are_config_errors_that_name_the_key(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_options(**options)


def test_a_damaged_tokenizer_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    model = make_model_folder(tmp_path / "model")
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(OmniError, match="the tokenizer: cannot be read"):
        make_engine(model)


def test_the_end_of_sequence_ids_fall_back_to_config_and_tokenizer(tmp_path: Path) -> None:
    model = make_model_folder(tmp_path / "model")
    (model / "generation_config.json").unlink()
    assert end_of_sequence_ids(model, TextProcessor(model).tokenizer) == {2}
    edit_json(model / "config.json", eos_token_id=7)
    assert end_of_sequence_ids(model, TextProcessor(model).tokenizer) == {7}
    edit_json(model / "config.json", eos_token_id=None)
    assert end_of_sequence_ids(model, TextProcessor(model).tokenizer) == {2}
