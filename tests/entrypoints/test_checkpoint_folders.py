"""Folders that transformers loads are loaded, whatever else lies in them, and write what transformers writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.ar import EOS, edit_json, make_model_folder
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from vllm_omni import Omni, SamplingParams
from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.layers.weights import tensor_files
from vllm_omni.worker.ar.language_model import LanguageModelFolder

IDS = [60, 70, 80, 90, 100, 71, 81, 91]
GREEDY = SamplingParams(temperature=0, max_tokens=10)


def add_stale_index(folder: Path) -> None:
    names = dict.fromkeys(load_file(folder / "model.safetensors"), "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def add_old_shards(folder: Path) -> None:
    """An index with all its shards, of other weights, beside the whole file."""
    zeros = {name: torch.zeros_like(tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(zeros, folder / "model-00001-of-00001.safetensors", {"format": "pt"})
    weight_map = dict.fromkeys(zeros, "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def shard(folder: Path) -> None:
    """The weights in two files and an index."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1


def add_adapter(folder: Path) -> None:
    save_file({"base_model.model.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")


def add_mac_files(folder: Path) -> None:
    for file in list(folder.iterdir()):
        (folder / f"._{file.name}").write_bytes(b"\x00\x05\x16\x07" * 8)


def add_half_precision_copy(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "model.fp16.safetensors")


def remove_architectures(folder: Path) -> None:
    edit_json(folder / "config.json", architectures=None)


def empty_architectures(folder: Path) -> None:
    edit_json(folder / "config.json", architectures=[])


def keep_vocabulary_and_merges(folder: Path) -> None:
    """The tokenizer as two files, which mean the class that the model's type names."""
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = dict(content["model"]["vocab"])
    vocabulary |= {token["content"]: token["id"] for token in content["added_tokens"]}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]]
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)


CHANGES: dict[str, list[Any]] = {
    "a stale index": [add_stale_index],
    "an index of other weights": [add_old_shards],
    "shards": [shard],
    "shards and an adapter": [shard, add_adapter],
    "a whole file and an adapter": [add_adapter],
    "shards and files of macOS": [shard, add_mac_files],
    "a whole file and files of macOS": [add_mac_files],
    "a half-precision copy": [add_half_precision_copy],
    "no architectures": [remove_architectures],
    "empty architectures": [empty_architectures],
    "vocabulary and merges": [keep_vocabulary_and_merges],
    "all at once": [keep_vocabulary_and_merges, add_stale_index, add_adapter, add_mac_files, remove_architectures],
}


@torch.no_grad()
def expected_ids(folder: Path, prompt: list[int]) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    written = model.generate(
        torch.tensor([prompt]), max_new_tokens=10, do_sample=False, eos_token_id=EOS, pad_token_id=0
    )
    return list(written[0, len(prompt) :].tolist())


@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_that_transformers_loads_writes_the_same(change: str, tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model", template=None)
    for step in CHANGES[change]:
        step(folder)
    with Omni(model=str(folder), device="cpu", dtype="float32") as omni:
        by_ids, by_words = omni.generate([IDS, "a red circle"], GREEDY)
    prompt = AutoTokenizer.from_pretrained(folder)("a red circle")["input_ids"]
    assert by_ids.error is None and by_words.error is None
    assert list(by_ids.token_ids) == expected_ids(folder, IDS)
    assert list(by_words.token_ids) == expected_ids(folder, prompt)


def test_shards_without_an_index_are_loaded_without_the_adapter_beside_them(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model")
    names = set(tensor_files(folder))
    shard(folder)
    add_adapter(folder)
    add_mac_files(folder)
    (folder / "model.safetensors.index.json").unlink()
    shutil.copy(next(folder.glob("model-00001*")), folder / "consolidated.safetensors")
    found = tensor_files(folder)
    assert set(found) == names and not any("consolidated" in file.name for file in found.values())


def test_a_pipeline_part_is_read_from_its_index_unless_that_is_stale(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(1), "b": torch.ones(1)}
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    save_file(tensors, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "part.safetensors")}))
    assert {file.name for file in tensor_files(tmp_path).values()} == {"diffusion_pytorch_model.safetensors"}
    save_file(tensors, tmp_path / "part.safetensors")
    assert {file.name for file in tensor_files(tmp_path).values()} == {"part.safetensors"}


def test_of_several_variants_one_is_read(tmp_path: Path) -> None:
    for number, variant in enumerate(("bf16", "fp16")):
        for part in "ab":
            name = f"model-0000{1 + 'ab'.index(part)}-of-00002.{variant}.safetensors"
            save_file({part: torch.full((1,), float(number))}, tmp_path / name)
    save_file({"c": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    (tmp_path / "consolidated.safetensors").rename(tmp_path / "consolidated.bf16.safetensors")
    files = {file.name for file in tensor_files(tmp_path).values()}
    assert files == {f"model-0000{n}-of-00002.fp16.safetensors" for n in (1, 2)}


@pytest.mark.parametrize("tied", [True, False])
def test_a_base_model_without_architectures_is_told_by_its_weights(tied: bool, tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model", base_model=True, tie_word_embeddings=tied)
    remove_architectures(folder)
    model = LanguageModelFolder.open(folder)
    assert (model.name, model.config.can_write) == (("Qwen3ForCausalLM", True) if tied else ("Qwen3Model", False))
    model.load(torch.device("cpu"), torch.float32)
    assert AutoModel.from_pretrained(folder) is not None


def test_several_architectures_mean_the_first_that_is_known(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model")
    edit_json(folder / "config.json", architectures=["MyOwnModel", "Qwen3ForCausalLM"])
    assert LanguageModelFolder.open(folder).name == "Qwen3ForCausalLM"


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["GemmaForCausalLM"]},
        {"architectures": ["Lama4ForCausalLM"]},
        {"architectures": None, "model_type": "gemma"},
        {"architectures": None, "model_type": None},
        {"architectures": "Qwen3ForCausalLM"},
        {"architectures": [3]},
    ],
)
def test_an_unknown_model_is_refused_and_nobody_is_told_to_edit_the_file(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    folder = make_model_folder(tmp_path / "model")
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ConfigError, match=r"config\.json: architectures: got") as refusal:
        LanguageModelFolder.open(folder)
    assert "did you mean" not in str(refusal.value) and "expected" in str(refusal.value)
    with pytest.raises(ConfigError) as at_load:
        Omni(model=str(folder), device="cpu")
    assert "did you mean" not in str(at_load.value)


class TestWithoutTokenizer:
    """A folder of weights and configuration alone."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = make_model_folder(tmp_path / "weights" / "model")
        for file in folder.iterdir():
            if file.suffix == ".jinja" or "token" in file.name:
                file.unlink()
        return folder

    def test_token_ids_are_read_and_written(self, folder: Path) -> None:
        with Omni(model=str(folder), device="cpu", dtype="float32") as omni:
            output = omni.generate({"prompt_token_ids": IDS}, GREEDY)[0]
            parts = list(omni.stream(IDS, GREEDY))
        assert output.error is None and output.text == ""
        assert list(output.token_ids) == list(parts[-1].token_ids) == expected_ids(folder, IDS)

    def test_the_ending_token_of_the_file_ends_the_text(self, folder: Path) -> None:
        end = expected_ids(folder, IDS)[3]
        edit_json(folder / "generation_config.json", eos_token_id=end)
        with Omni(model=str(folder), device="cpu", dtype="float32") as omni:
            output = omni.generate(IDS, GREEDY)[0]
        assert output.finish_reason == "stop" and output.token_ids[-1] == end

    @pytest.mark.parametrize("prompt", ["words", [{"role": "user", "content": "words"}]])
    def test_words_are_refused_by_what_is_missing(self, prompt: Any, folder: Path) -> None:
        with Omni(model=str(folder), device="cpu", dtype="float32") as omni:
            wrong, right = omni.generate([prompt, IDS], GREEDY)
        assert isinstance(wrong.error, InvalidRequestError) and "has no tokenizer" in str(wrong.error)
        assert right.error is None

    def test_stop_strings_are_refused_and_stop_tokens_are_not(self, folder: Path) -> None:
        with Omni(model=str(folder), device="cpu", dtype="float32") as omni:
            wrong = omni.generate(IDS, SamplingParams(stop=["x"]))[0]
            right = omni.generate(IDS, SamplingParams(temperature=0, max_tokens=4, stop_token_ids=[5]))[0]
        assert isinstance(wrong.error, InvalidRequestError) and "stop_token_ids" in str(wrong.error)
        assert right.error is None

    @pytest.mark.parametrize("key", ["system_prompt=Be brief", "sections=[scene]"])
    def test_keys_that_need_words_are_refused_at_load(self, key: str, folder: Path) -> None:
        with pytest.raises(ConfigError, match="tokenizer: found none"):
            Omni(model=str(folder), device="cpu", overrides=[f"text.{key}"])

    def test_a_tokenizer_that_is_named_must_be_there(self, folder: Path) -> None:
        with pytest.raises(ConfigError, match=r"tokenizer: found none in .*vocab.json and merges.txt"):
            Omni(model=str(folder), device="cpu", overrides=[f"text.tokenizer={folder}"])


class TestATokenizerThatPanics:
    """The library is written in Rust, and panics with what is no Exception."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return make_model_folder(tmp_path / "model")

    def test_over_a_text_its_request_fails_alone(self, folder: Path) -> None:
        edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
        edit_json(folder / "tokenizer.json", pre_tokenizer={"type": "FixedLength", "length": 0})
        with Omni(model=str(folder), device="cpu", dtype="float32") as omni:
            wrong, right = omni.generate(["words", IDS], GREEDY)
        assert isinstance(wrong.error, InvalidRequestError) and "tokenizer cannot read this text" in str(wrong.error)
        assert right.error is None and right.token_ids

    def test_over_its_own_tokens_the_loop_goes_on(self, folder: Path) -> None:
        with Omni(model=str(folder), device="cpu", dtype="float32") as omni:
            expected = omni.generate("words", GREEDY)[0].token_ids
        edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
        edit_json(folder / "tokenizer.json", decoder={"type": "Strip", "content": "a", "start": 5, "stop": 5})
        with Omni(model=str(folder), device="cpu", dtype="float32") as omni:
            for _ in range(3):
                found = omni.generate("words", GREEDY)[0]
                assert found.error is not None or found.token_ids == expected
