"""Scaled rotary positions against transformers beyond the original length: from config.json, and from the stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.ar import edit_json, load, make_engine, make_model_folder, make_spec, make_stage, make_task, run, tokens_of
from transformers import Qwen3ForCausalLM

from vllm_omni import Omni
from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.messages import StageDone
from vllm_omni.params import SamplingParams
from vllm_omni.worker.ar.language_model import LanguageModelFolder

ORIGINAL = 32
SHORT = [1, 60, 70, 80, 90, 100, 71, 81, 91, 60, 70, 80, 5, 6, 7]
LONG = [*SHORT, *range(100, 135)]  # longer than the original length
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0},
    "yarn with all its keys": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
        "attention_factor": 1.3,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "llama3": LLAMA3,
    "longrope": LONGROPE,
}
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=5)


def make_folder(folder: Path, scaling: dict[str, Any] | None = None) -> Path:
    rope = {"rope_theta": 1000.0, **(scaling or {"rope_type": "default"})}
    return make_model_folder(folder, max_position_embeddings=ORIGINAL, rope_parameters=rope)


@torch.no_grad()
def assert_writes_as_transformers(done: Any, folder: Path, prompt: list[int]) -> None:
    """Greedy tokens and log probabilities of each step."""
    assert isinstance(done, StageDone), done
    published = Qwen3ForCausalLM.from_pretrained(folder).eval()
    expected = published.generate(
        torch.tensor([prompt]),
        max_new_tokens=GREEDY.max_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert done.payload.meta["token_ids"] == expected.sequences[0, len(prompt) :].tolist()
    for logits, logprobs in zip(expected.logits, done.payload.meta["completions"][0]["logprobs"], strict=True):
        theirs = logits[0].log_softmax(-1)
        for token, value in logprobs:
            assert value == pytest.approx(float(theirs[token]), abs=1e-4)


@pytest.mark.parametrize("prompt", [SHORT, LONG], ids=["written beyond", "prompt beyond"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_texts_beyond_the_original_length_equal_transformers(scaling: str, prompt: list[int], tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", SCALINGS[scaling])
    assert LanguageModelFolder.open(folder).config.num_positions == 4 * ORIGINAL
    engine = make_engine(folder, max_num_batched_tokens=7)
    assert_writes_as_transformers(run(engine, make_task(prompt, GREEDY))["r"], folder, prompt)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_stage_key_means_what_the_file_would(scaling: str, tmp_path: Path) -> None:
    plain = make_folder(tmp_path / "plain")
    edited = make_folder(tmp_path / "edited", SCALINGS[scaling])
    engine = make_engine(plain, rope_scaling=SCALINGS[scaling])
    assert_writes_as_transformers(run(engine, make_task(LONG, GREEDY))["r"], edited, LONG)


def test_the_stage_key_stands_above_the_file_and_can_switch_scaling_off(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", {**SCALINGS["yarn"], "original_max_position_embeddings": 16})
    own = LanguageModelFolder.open(folder).config
    other = LanguageModelFolder.open(folder, rope_scaling={"rope_type": "yarn", "factor": 16.0}).config
    off = LanguageModelFolder.open(folder, rope_scaling={"rope_type": "default"}).config
    assert (own.num_positions, other.num_positions, off.num_positions) == (64, 256, ORIGINAL)
    assert other.rope["original_max_position_embeddings"] == 16 and other.rope["rope_theta"] == 1000.0


def test_a_rope_scaling_written_into_the_file_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    edit_json(folder / "config.json", rope_scaling={"type": "yarn", "factor": 4.0})
    assert_writes_as_transformers(run(make_engine(folder), make_task(LONG, GREEDY))["r"], folder, LONG)
    edit_json(folder / "config.json", rope_scaling={"type": "yarn", "factor": 4.0}, rope_theta=1000.0)
    assert_writes_as_transformers(run(make_engine(folder), make_task(LONG, GREEDY))["r"], folder, LONG)


def test_the_positions_of_published_files() -> None:
    from vllm_omni.layers.rope_config import num_positions

    qwen3 = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    llama3_1 = {**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 8192}
    llama3_2 = {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192}
    assert num_positions({"rope_type": "default"}, 40960) == 40960
    assert num_positions(qwen3, 40960) == num_positions(qwen3, 131072) == 131072
    assert num_positions(llama3_1, 131072) == num_positions(llama3_2, 131072) == 131072
    assert num_positions({"rope_type": "dynamic", "factor": 2.5}, 4096) == 10240
    assert num_positions({**LONGROPE, "original_max_position_embeddings": 4096}, 131072) == 131072


def test_a_length_beyond_the_scaled_positions_is_refused_and_one_within_is_not(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    make_engine(folder, max_model_len=128, rope_scaling=SCALINGS["yarn"])
    with pytest.raises(ConfigError, match=r"max_model_len: got 129, expected at most 128, the model's positions"):
        make_engine(folder, max_model_len=129, rope_scaling=SCALINGS["yarn"])
    with pytest.raises(ConfigError, match=r"got 33, expected at most 32.*rope_scaling extends them"):
        make_engine(folder, max_model_len=33)


@pytest.mark.parametrize("scaling", ["dynamic", "longrope"])
def test_scaling_by_length_is_the_same_alone_and_after_a_shorter_prompt_with_the_same_beginning(
    scaling: str, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / "model", SCALINGS[scaling])
    alone = tokens_of(run(make_engine(folder), make_task(LONG, GREEDY))["r"])
    engine = make_engine(folder)
    run(engine, make_task(LONG[:40], GREEDY, "first"))
    crowd = run(engine, make_task(LONG, GREEDY, "r"), make_task(SHORT, GREEDY, "s"), make_task(LONG[:33], GREEDY, "t"))
    assert tokens_of(crowd["r"]) == alone
    within = make_engine(folder, max_model_len=ORIGINAL)
    few = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    run(within, make_task(SHORT, few, "first"))
    again = run(within, make_task(SHORT, few))["r"]
    assert isinstance(again, StageDone) and again.metrics["cache_hits"] > 0, "within the original length blocks serve"


def test_stages_with_different_scaling_do_not_share_a_model(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    plain, scaled = (make_spec(make_stage(folder, rope_scaling=scaling)) for scaling in (None, SCALINGS["linear"]))
    assert plain.model.key != scaled.model.key and plain.weights_key() != scaled.weights_key()
    assert tokens_of(run(load(scaled), make_task(SHORT, GREEDY))["r"])


@pytest.mark.parametrize(
    ("scaling", "complaint"),
    [
        ({}, r"rope_scaling.rope_type: got None, expected one of default, linear"),
        ({"rope_type": "ntk", "factor": 2}, r"rope_scaling.rope_type: got 'ntk'"),
        ({"rope_type": "yarn"}, r"rope_scaling.factor: got None, expected a finite number"),
        ({"rope_type": "linear", "factor": "4"}, r"rope_scaling.factor: got '4'"),
        ({"rope_type": "linear", "factor": 0.5}, r"rope_scaling.factor: got 0.5, expected at least 1"),
        ({"rope_type": "linear", "factor": 1e30}, r"rope_scaling.factor: got 1e\+30"),
        ({"rope_type": "linear", "factor": 4, "faktor": 1}, r"got 'faktor' \(did you mean 'factor'"),
        ({"rope_type": "linear", "factor": 4, "beta_fast": 1}, r"rope_scaling: got 'beta_fast'"),
        ({"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 0}, r"original_max.*got 0"),
        ({"rope_type": "yarn", "factor": 4, "beta_slow": float("nan")}, r"rope_scaling.beta_slow: got nan"),
        ({"rope_type": "longrope", "factor": 4}, r"rope_scaling.long_factor: got None, expected a list"),
        ({**LLAMA3, "low_freq_factor": None}, r"rope_scaling.low_freq_factor: got None"),
        ({**LONGROPE, "long_factor": [1.0]}, r"rope_scaling.long_factor: got 1 numbers, expected 8"),
        ({**LONGROPE, "short_factor": "12345678"}, r"rope_scaling.short_factor: got '12345678', expected a list"),
        ({**LONGROPE, "short_factor": [0.0] * 8}, r"rope_scaling.short_factor: got \[0.0"),
    ],
)
def test_a_scaling_that_makes_no_positions_is_a_config_error_that_names_the_key(
    scaling: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / "model")
    with pytest.raises(ConfigError, match=complaint):
        make_engine(folder, rope_scaling=scaling)


def test_the_public_surface_takes_the_key_and_the_longer_prompt(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    edited = make_folder(tmp_path / "edited", SCALINGS["yarn"])
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    with Omni(model=str(folder), device="cpu", dtype="float32") as omni:
        refused = omni.generate(LONG, params)[0]
    assert isinstance(refused.error, InvalidRequestError) and "expected at most 31" in str(refused.error)
    key = "text.rope_scaling={rope_type: yarn, factor: 4.0}"
    with Omni(model=str(folder), device="cpu", dtype="float32", overrides=[key]) as omni:
        by_key = omni.generate(LONG, params)[0]
    with Omni(model=str(edited), device="cpu", dtype="float32") as omni:
        by_file = omni.generate(LONG, params)[0]
    assert by_key.error is None and by_key.token_ids == by_file.token_ids
