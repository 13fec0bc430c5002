"""Adapters of a language model: sequences with several, one and none in one batch write what transformers writes with
merged weights, alone and in a crowd, with prefixes shared and preempted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ar import (
    assert_clean,
    done,
    drain,
    failed,
    make_encoder,
    make_engine,
    make_model_folder,
    make_spec,
    make_stage,
    make_task,
    run,
    states_of,
    submit,
    tokens_of,
)
from support.lora import RandomLoRA, merged, random_lora
from transformers import AutoTokenizer, Qwen3ForCausalLM

from vllm_omni import LoRA, SamplingParams
from vllm_omni.errors import InvalidRequestError
from vllm_omni.worker.model_pool import ModelPool

NUM_TOKENS = 12
PROMPT = "a red circle left of a blue square"
MIXES: dict[str, list[tuple[str, float]]] = {
    "none": [],
    "all": [("all", 1.0)],
    "mlp": [("mlp", -1.0)],
    "both": [("all", 0.5), ("mlp", 1.5)],
    "head": [("head", 1.0)],
}


class Checkpoint:
    """A model with its own head, and LoRA files for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = make_model_folder(folder / "model", tie_word_embeddings=False)
        self.model = Qwen3ForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.loras_folder = folder / "loras"
        self.loras_folder.mkdir()
        self.loras = {
            "all": random_lora(self.model, 1, chosen=lambda name: "layers" in name),
            "mlp": random_lora(self.model, 2, rank=3, alpha=6.0, chosen=lambda name: "mlp" in name),
            "head": random_lora(self.model, 3, chosen=lambda name: name == "lm_head"),
        }
        self.save_peft("all", alpha=4)
        self.loras["mlp"].save(self.loras_folder / "mlp.safetensors", self.loras["mlp"].as_kohya())
        self.loras["head"].save(self.loras_folder / "head.safetensors")

    @property
    def lora(self) -> dict[str, Any]:
        """The stage's section."""
        return {"folders": [str(self.loras_folder)]}

    def save_peft(self, name: str, alpha: float) -> None:
        """As PEFT's save_pretrained, under a name of its own."""
        tensors = self.loras[name].as_peft("base_model.model.")
        self.loras[name].save(self.loras_folder / f"{name}.safetensors", tensors)
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": alpha, "use_rslora": False, "target_modules": ["q_proj"]}
        (self.loras_folder / f"{name}.json").write_text(json.dumps(config))

    def adapted(self, mix: str) -> Qwen3ForCausalLM:
        return merged(self.model, [(self.loras[name], scale) for name, scale in MIXES[mix]])

    @torch.no_grad()
    def expected(self, mix: str) -> list[int]:
        """Greedy tokens of transformers."""
        ids = self.tokenizer(PROMPT, return_tensors="pt").input_ids
        written = self.adapted(mix).generate(
            ids, max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        return written[0, ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(tmp_path_factory.mktemp("ar-lora"))


def params(mix: str, **more: Any) -> SamplingParams:
    loras = [LoRA(name, scale=scale) for name, scale in MIXES[mix]]
    return SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, lora=loras, **more)


def test_sequences_of_every_mix_in_one_batch_write_what_merged_weights_write(checkpoint: Checkpoint) -> None:
    expected = {mix: checkpoint.expected(mix) for mix in MIXES}
    assert len({tuple(tokens) for tokens in expected.values()}) == len(MIXES), "adapters that change nothing"
    engine = make_engine(checkpoint.folder, lora=checkpoint.lora)
    for _ in range(2):  # the second time from cached prefixes
        found = run(engine, *(make_task(PROMPT, params(mix), mix) for mix in MIXES))
        assert {mix: tokens_of(event) for mix, event in found.items()} == expected
        assert_clean(engine)
    assert all(done(event).metrics["cached_tokens"] > 0 for event in found.values()), "each has a prefix of its own"


@pytest.mark.parametrize("mix", MIXES)
def test_alone_equals_in_a_crowd(checkpoint: Checkpoint, mix: str) -> None:
    engine = make_engine(checkpoint.folder, lora=checkpoint.lora)
    assert tokens_of(run(engine, make_task(PROMPT, params(mix), "r"))["r"]) == checkpoint.expected(mix)


def test_blocks_are_shared_under_the_same_adapters_and_scales_alone(checkpoint: Checkpoint) -> None:
    engine = make_engine(checkpoint.folder, lora=checkpoint.lora)
    cached = []
    for index, loras in enumerate([[], [LoRA("all")], [LoRA("all")], [LoRA("all", scale=0.5)], [LoRA("all", scale=0)]]):
        task = make_task(PROMPT, SamplingParams(temperature=0, max_tokens=1, lora=loras), f"r{index}")
        cached.append(done(run(engine, task)[f"r{index}"]).metrics["cached_tokens"] > 0)
    assert cached == [False, False, True, False, True]  # a scale of 0 is as no adapter


def test_preempted_sequences_go_on_with_their_adapters(checkpoint: Checkpoint) -> None:
    engine = make_engine(checkpoint.folder, lora=checkpoint.lora, num_blocks=14)
    found = run(engine, *(make_task(PROMPT, params(mix), mix) for mix in MIXES))
    assert {mix: tokens_of(event) for mix, event in found.items()} == {mix: checkpoint.expected(mix) for mix in MIXES}
    assert engine.get_stats()["num_preemptions"] > 0
    assert_clean(engine)


def test_an_encoder_takes_adapters_and_its_cache_key_says_so(checkpoint: Checkpoint) -> None:
    engine = make_encoder(checkpoint.folder, lora=checkpoint.lora)
    tasks = [make_task(PROMPT, SamplingParams(lora=params(mix).lora), mix) for mix in ("none", "all", "both")]
    found = run(engine, *tasks)
    spec = make_spec(
        make_stage(checkpoint.folder, task="encode", outputs={"h": {"layers": [-2]}}, lora=checkpoint.lora)
    )
    ids = checkpoint.tokenizer(PROMPT, return_tensors="pt").input_ids
    for task in tasks:
        with torch.no_grad():
            expected = checkpoint.adapted(task.request_id)(ids, output_hidden_states=True).hidden_states[-2][0]
        torch.testing.assert_close(states_of(found[task.request_id]), expected, atol=2e-4, rtol=2e-4)
    assert len({spec.cache_key(task) for task in tasks}) == len(tasks)


def test_tasks_wait_while_the_pool_is_held_by_running_ones(checkpoint: Checkpoint) -> None:
    sizes = {name: bytes_of(lora) for name, lora in checkpoint.loras.items()}
    room = max(sizes["all"], sizes["mlp"] + sizes["head"]) / 2**20
    engine = make_engine(checkpoint.folder, lora={**checkpoint.lora, "max_memory_mb": room})
    submit(engine, *(make_task(PROMPT, params(mix), mix) for mix in ("all", "mlp", "none", "head")))
    events = drain(engine)
    order = [event.request_id for event in events if type(event).__name__ == "StageDone"]
    assert order.index("all") < order.index("mlp") and set(order) == {"all", "mlp", "none", "head"}
    assert engine.get_stats()["lora_evictions"] > 0
    assert engine.get_stats()["lora_owners"] == 0
    assert_clean(engine)


def test_an_aborted_task_holds_no_adapter_loaded_or_waiting(checkpoint: Checkpoint) -> None:
    engine = make_engine(checkpoint.folder, lora=checkpoint.lora)
    submit(engine, *(make_task(PROMPT, params(mix), mix) for mix in MIXES))
    engine.abort("both")  # which waits
    engine.step()
    for mix in MIXES:
        engine.abort(mix)
    assert engine.get_stats()["lora_owners"] == 0
    assert_clean(engine)


def test_stages_of_one_model_share_adapters(checkpoint: Checkpoint) -> None:
    models = ModelPool()
    engines = [make_engine(checkpoint.folder, lora=checkpoint.lora, models=models) for _ in range(2)]
    for engine in engines:
        run(engine, make_task(PROMPT, params("all"), "r"))
    assert engines[0].get_stats()["lora_loads"] == 1 and engines[0].get_stats()["lora_hits"] == 1
    assert len(models) == 1


def test_a_file_that_becomes_bad_fails_its_task_alone(checkpoint: Checkpoint) -> None:
    bad = checkpoint.loras_folder / "bad.safetensors"
    tensors = checkpoint.loras["mlp"].as_kohya()
    name = next(name for name in tensors if "lora_up" in name)
    tensors[name] = tensors[name] * float("nan")
    checkpoint.loras["mlp"].save(bad, tensors)
    engine = make_engine(checkpoint.folder, lora=checkpoint.lora)
    task = make_task(PROMPT, SamplingParams(lora=[LoRA("bad")]), "bad")  # only its numbers are wrong
    found = run(engine, task, make_task(PROMPT, params("both"), "both"))
    assert "finite" in failed(found["bad"])
    assert tokens_of(found["both"]) == checkpoint.expected("both")
    assert engine.get_stats()["lora_owners"] == 0


def test_a_peft_file_without_its_alpha_is_refused(checkpoint: Checkpoint) -> None:
    checkpoint.loras["all"].save(
        checkpoint.loras_folder / "bare.safetensors", checkpoint.loras["all"].as_peft("base_model.model.")
    )
    engine = make_engine(checkpoint.folder, lora=checkpoint.lora)
    with pytest.raises(InvalidRequestError, match=r"adapter_config\.json"):
        submit(engine, make_task(PROMPT, SamplingParams(lora=[LoRA("bare")])))


def bytes_of(lora: RandomLoRA) -> int:
    return sum((down.numel() + up.numel()) * 4 for down, up, _ in lora.layers.values())
