"""The words of the shipped ACE-Step config, as its stages `prompt`, `text`, `plain_text` and `lyrics` compute them:
equal to what diffusers' pipeline makes of the same request with the same text encoder, and never cut.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import AceStepPipeline
from diffusers.pipelines.ace_step.pipeline_ace_step import TASK_INSTRUCTIONS
from support.ar import PROMPT_STATES, make_engine, make_model_folder, make_task, make_tokenizer, run, states_of
from support.music import codes, save_folder
from support.toy_engine import register_toys
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Model

from vllm_omni import Omni
from vllm_omni.config.loader import load_config
from vllm_omni.config.shipped import config_for_model, shipped_configs
from vllm_omni.layers.decoder import DecoderLayer

OUTPUTS = ["text.hidden_states", "plain_text.hidden_states", "lyrics.embeddings"]


def embedding_tokenizer() -> PreTrainedTokenizerFast:
    """Ends every text in <|endoftext|>, as the published one of the text encoder does."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_folder(tmp_path_factory.mktemp("ace_step"))
    make_model_folder(folder / "text_encoder", base_model=True, tie_word_embeddings=True, max_position_embeddings=4096)
    for file in (folder / "text_encoder").glob("tokenizer*"):
        file.unlink()
    embedding_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def omni(folder: Path) -> Omni:
    """The shipped config without the stage that makes the sound."""
    config = yaml.safe_load(shipped_configs()["ace_step"].read_text())
    del config["stages"]["music"]
    return Omni({**config, "model": str(folder), "outputs": OUTPUTS}, progress=False)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> AceStepPipeline:
    return AceStepPipeline(
        vae=None,
        text_encoder=Qwen3Model.from_pretrained(folder / "text_encoder").eval(),
        tokenizer=PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"),
        transformer=None,
        condition_encoder=None,
        scheduler=None,
    )


@torch.no_grad()
def reference(pipeline: AceStepPipeline, task: str, duration_s: float, **fields: Any) -> tuple[Tensor, Tensor]:
    """(states of the caption, embeddings of the lyrics), [T, D] each."""
    text, _, lyrics, _ = pipeline.encode_prompt(
        "warm piano",
        fields.pop("lyrics", ""),
        torch.device("cpu"),
        audio_duration=duration_s,
        instruction=TASK_INSTRUCTIONS[task],
        **fields,
    )
    return text[0], lyrics[0]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"lyrics": "[verse]\nthe end of the world\n", "vocal_language": "zh", "bpm": 84, "keyscale": "A minor"},
        {"lyrics": "你好 " * 200, "timesignature": "4"},
    ],
)
def test_the_words_are_encoded_as_diffusers_encodes_them(
    omni: Omni, pipeline: AceStepPipeline, fields: dict[str, Any]
) -> None:
    (output,) = omni.generate({"prompt": "warm piano", "duration_s": 12.5, **fields})
    assert output.error is None
    text, lyrics = reference(pipeline, "text2music", 12.5, **fields)
    found = output.tensors
    assert torch.equal(found["lyrics.embeddings"], lyrics)
    for port in ("text.hidden_states", "plain_text.hidden_states"):
        assert found[port].shape == text.shape
        assert (found[port] - text).norm() <= 1e-4 * text.norm()


def test_a_cover_reads_its_own_instruction_and_the_plain_one(folder: Path, pipeline: AceStepPipeline) -> None:
    config = yaml.safe_load(shipped_configs()["ace_step"].read_text())
    register_toys()
    config["stages"]["music"] = {"kind": "toy_text", "inputs": {"words": "prompt.audio_codes"}}
    with Omni({**config, "model": str(folder), "outputs": [*OUTPUTS, "music"]}, progress=False) as omni:
        (output,) = omni.generate({"prompt": "warm piano", "audio_codes": codes(10)})
    seconds = 10 * 4 * 640 / 16_000
    for port, task in (("text", "cover"), ("plain_text", "text2music")):
        theirs, _ = reference(pipeline, task, seconds)
        ours = output.tensors[f"{port}.hidden_states"]
        assert ours.shape == theirs.shape and (ours - theirs).norm() <= 1e-4 * theirs.norm()


@pytest.mark.parametrize(
    ("fields", "port", "words"),
    [
        ({"prompt": "warm piano " * 200}, "text.hidden_states", "text' failed: .* at most 256 .max_prompt_tok"),
        ({"prompt": "a", "lyrics": "la " * 2000}, "lyrics.embeddings", "stage 'lyrics' failed: .* at most 2048 "),
    ],
)
def test_words_beyond_what_the_model_reads_are_refused_not_cut(
    omni: Omni, fields: dict[str, Any], port: str, words: str
) -> None:
    (output,) = omni.generate(fields)
    assert re.search(words, str(output.error)) and port not in output.tensors


def test_a_stage_of_embeddings_alone_runs_no_layer_and_keeps_no_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DecoderLayer, "forward", lambda *_: pytest.fail("a layer ran"))
    outputs = {"h": {"layers": [0]}}
    folder = make_model_folder(tmp_path, base_model=True)
    engine = make_engine(folder, task="encode", wanted=["h"], outputs=outputs, num_blocks=64, max_num_batched_tokens=7)
    prompts = [[5, 6, 7] * length for length in (1, 9, 30)]
    done = run(engine, *(make_task(prompt, request_id=str(index)) for index, prompt in enumerate(prompts)))
    table = Qwen3Model.from_pretrained(folder).get_input_embeddings()
    for index, prompt in enumerate(prompts):
        assert torch.equal(states_of(done[str(index)]), table(torch.tensor(prompt)))
    slots = 64 * 4
    assert engine.get_stats()["kv_pool_bytes"] == slots * 32 * 4  # one state a slot, and nothing else
    whole = make_engine(folder, task="encode", wanted=["h"], outputs=PROMPT_STATES, num_blocks=64)
    assert whole.get_stats()["kv_pool_bytes"] > slots * 32 * 4


def test_an_ace_step_folder_finds_its_config(folder: Path) -> None:
    assert config_for_model(folder) == shipped_configs()["ace_step"]


def test_the_planner_writes_between_the_prompt_and_the_music() -> None:
    config = load_config("ace_step_planner")
    planner, music = config.stages["planner"], config.stages["music"]
    assert (planner.inputs["prompt"], music.inputs["audio_codes"]) == ("prompt.planner_prompt", "planner.text")
    assert planner.defaults["skip_special_tokens"] is False and planner.options.chat_template is False
    plain = load_config("ace_step").stages
    assert {name: stage for name, stage in config.stages.items() if name not in ("planner", "music")} == {
        name: stage for name, stage in plain.items() if name != "music"
    }
