"""Which LoRA files are taken: allowed folders alone, every published naming, and a clear word for whatever is wrong."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from support.dit import random_transformer
from support.lora import RandomLoRA, random_lora
from torch import Tensor

from vllm_omni import LoRA
from vllm_omni.config.schema import LoRAConfig
from vllm_omni.engine.lora import LoRASource
from vllm_omni.errors import CheckpointError, ConfigError, InvalidRequestError, OmniError
from vllm_omni.layers.lora import Adapter
from vllm_omni.models.z_image.config import ZImageConfig
from vllm_omni.models.z_image.transformer import ZImageTransformer
from vllm_omni.worker.lora.folders import LoRAFile
from vllm_omni.worker.lora.loading import load_adapter
from vllm_omni.worker.lora.plan import plan_lora
from vllm_omni.worker.lora.target import LoRATarget

ATTENTION = "layers.0.attention.to_q"


class Model:
    """A small model as a file's names see it, and as it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.published = random_transformer()
        self.published.save_pretrained(folder)
        config = ZImageConfig.from_folder(folder)
        with torch.device("meta"):
            self.target = LoRATarget(ZImageTransformer(config), self.published.state_dict(), {})
        self.loaded = ZImageTransformer(config)

    def plan(self, file: Path, max_rank: int = 64) -> Any:
        return plan_lora(LoRAFile.of(file), self.target, max_rank)

    def load(self, file: Path) -> Adapter:
        return load_adapter(self.plan(file), self.loaded, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def lora(model: Model) -> RandomLoRA:
    return random_lora(model.published, 1, alpha=2.0)


def added(model: Model, adapter: Adapter) -> dict[str, Tensor]:
    """What it adds to each layer's weight, by the layer's path."""
    names = {part: name for name, part in model.loaded.named_modules()}
    found = {}
    for layer, low in adapter.layers.items():
        total = torch.zeros_like(layer.weight)
        for up in low.ups:
            total[up.columns] += up.matrix @ low.down[up.ranks]
        found[names[layer]] = total
    return found


NAMINGS: dict[str, Callable[[RandomLoRA], dict[str, Tensor]]] = {
    "diffusers": lambda lora: lora.as_peft(),
    "peft": lambda lora: lora.as_peft("base_model.model."),
    "bare": lambda lora: lora.as_peft(""),
    "comfy": lambda lora: lora.as_peft("diffusion_model."),
    "kohya": lambda lora: lora.as_kohya(),
    "kohya transformer": lambda lora: lora.as_kohya("lora_transformer_"),
    "dotted": lambda lora: {
        name.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): tensor
        for name, tensor in lora.as_peft("").items()
    },
    "peft with a name": lambda lora: {
        name.replace("lora_A", "lora_A.default").replace("lora_B", "lora_B.default"): tensor
        for name, tensor in lora.as_peft("base_model.model.").items()
    },
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_means_the_same(model: Model, lora: RandomLoRA, tmp_path: Path, naming: str) -> None:
    adapter = model.load(lora.save(tmp_path / "x.safetensors", NAMINGS[naming](lora)))
    found = added(model, adapter)
    linears = {name for name, part in model.loaded.named_modules() if isinstance(part, torch.nn.Linear)}
    assert found.keys() == linears, "every layer is adapted"
    width = model.published.config.dim
    for part, start in (("to_q", 0), ("to_k", width), ("to_v", 2 * width)):
        down, up, alpha = lora.layers[f"layers.1.attention.{part}"]
        expected = float(str(alpha)) / len(down) * up @ down
        torch.testing.assert_close(found["layers.1.attention.qkv"][start : start + width], expected)


def test_a_fused_projection_of_the_original_code_fits_the_fused_layer(model: Model, tmp_path: Path) -> None:
    width = model.published.config.dim
    down, up = torch.randn(2, width), torch.randn(3 * width, 2)
    for index, name in enumerate(("diffusion_model.layers.0.attention.qkv", "lora_unet_layers_0_attention_qkv")):
        file = tmp_path / f"{index}.safetensors"
        save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, file)
        torch.testing.assert_close(added(model, model.load(file))["layers.0.attention.qkv"], up @ down)


CONFIGS: list[tuple[dict[str, Any], float]] = [
    ({"lora_alpha": 8}, 8 / 4),
    ({"lora_alpha": 8, "use_rslora": True}, 8 / math.sqrt(4)),
    ({"lora_alpha": 8, "alpha_pattern": {"to_q": 2}}, 2 / 4),
    ({"lora_alpha": 8, "alpha_pattern": {"^layers.0.attention.to_q": 1}}, 1 / 4),
    ({"lora_alpha": 8, "alpha_pattern": {"^attention.to_q": 1}}, 8 / 4),
]


@pytest.mark.parametrize(("config", "factor"), CONFIGS)
@pytest.mark.parametrize("place", ["metadata", "beside", "adapter_config"])
def test_alpha_of_a_peft_config_counts(
    model: Model, tmp_path: Path, config: dict[str, Any], factor: float, place: str
) -> None:
    lora = random_lora(model.published, 1, chosen=lambda name: name == ATTENTION)
    tensors, metadata = lora.as_peft(), None
    file = tmp_path / ("adapter_model.safetensors" if place == "adapter_config" else "x.safetensors")
    if place == "metadata":
        metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in config.items()})}
    else:
        (tmp_path / ("x.json" if place == "beside" else "adapter_config.json")).write_text(json.dumps(config))
    save_file(tensors, file, metadata=metadata)
    assert [piece.factor for piece in model.plan(file).pieces] == [pytest.approx(factor)]


def changed(**tensors: Tensor | None) -> Callable[[RandomLoRA], dict[str, Tensor]]:
    """The diffusers naming with other tensors under the names of the attention layer; None: without."""

    def make(lora: RandomLoRA) -> dict[str, Tensor]:
        found = lora.as_peft()
        for kind, tensor in tensors.items():
            name = f"transformer.{ATTENTION}.{kind}" + ("" if kind == "alpha" else ".weight")
            found.pop(name, None)
            if tensor is not None:
                found[name] = tensor
        return found

    return make


def renamed(old: str, new: str) -> Callable[[RandomLoRA], dict[str, Tensor]]:
    return lambda lora: {name.replace(old, new): tensor for name, tensor in lora.as_peft().items()}


def also(name: str, *shape: int) -> Callable[[RandomLoRA], dict[str, Tensor]]:
    return lambda lora: {**lora.as_peft(), name: torch.zeros(*shape)}


BAD: dict[str, tuple[Callable[[RandomLoRA], dict[str, Tensor]], str]] = {
    "of another model": (renamed("layers.", "blocks."), "LoRA of another model"),
    "of a wider model": (changed(lora_A=torch.zeros(4, 65)), r"expected \[r, 64\]"),
    "ranks that differ": (changed(lora_A=torch.zeros(5, 64)), "to_q"),
    "no rank": (changed(lora_A=torch.zeros(0, 64), lora_B=torch.zeros(64, 0)), "rank 0"),
    "a rank too high": (changed(lora_A=torch.zeros(65, 64), lora_B=torch.zeros(64, 65)), "lora.max_rank"),
    "only down": (changed(lora_B=None), "down and up"),
    "alpha NaN": (changed(alpha=torch.tensor(float("nan"))), "alpha"),
    "two alphas": (changed(alpha=torch.ones(2)), "one number"),
    "whole numbers": (changed(lora_A=torch.zeros(4, 64, dtype=torch.int32)), "dtype I32"),
    "DoRA": (also(f"transformer.{ATTENTION}.lora_magnitude_vector", 64), "DoRA"),
    "LoKr": (also(f"transformer.{ATTENTION}.lokr_w1", 4, 4), "LoKr"),
    "a bias": (also(f"transformer.{ATTENTION}.lora_B.bias", 64), "biases"),
    "a weight": (also("transformer.x_pad_token", 64), "no part of a LoRA"),
    "a text encoder": (
        lambda lora: {
            **lora.as_peft(),
            **RandomLoRA({"a": (torch.zeros(1, 4), torch.zeros(4, 1), None)}).as_kohya("lora_te_"),
        },
        "text encoder, which is another stage's: lora_te_a",
    ),
    "a norm": (renamed("attention.to_q", "attention_norm1"), "attention_norm1"),
    "a layer twice": (
        lambda lora: {**lora.as_peft(), **RandomLoRA({ATTENTION: lora.layers[ATTENTION]}).as_kohya()},
        "the same layer",
    ),
    "nothing": (lambda lora: {}, "no tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_named(model: Model, lora: RandomLoRA, tmp_path: Path, case: str) -> None:
    make, words = BAD[case]
    file = tmp_path / "x.safetensors"
    save_file({name: tensor.clone() for name, tensor in make(random_lora(model.published, 1)).items()}, file)
    with pytest.raises(CheckpointError, match=words):
        model.plan(file)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_numbers_that_are_not_finite_in_the_models_dtype_are_refused(
    model: Model, tmp_path: Path, value: float
) -> None:
    made = random_lora(model.published, 1, chosen=lambda name: name == ATTENTION)
    tensors = made.as_peft()
    next(iter(tensors.values()))[0, 0] = value
    file = made.save(tmp_path / "x.safetensors", tensors)
    with pytest.raises(CheckpointError, match="finite"):
        load_adapter(model.plan(file), model.loaded, torch.device("cpu"), torch.float16)


def test_damaged_and_foreign_files_are_refused(model: Model, lora: RandomLoRA, tmp_path: Path) -> None:
    whole = save(lora.as_peft())
    contents = {
        "truncated": whole[:-1],
        "no header": whole[:4],
        "empty": b"",
        "pickle": pickle.dumps({"a": 1}),
        "a huge header": (2**62).to_bytes(8, "little") + b"{}",
        "a header that lies": (2**20).to_bytes(8, "little") + b"{}",
    }
    for name, content in contents.items():
        file = tmp_path / f"{name}.safetensors"
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="safetensors"):
            model.plan(file)


def test_a_file_that_changed_since_its_check_is_not_read(model: Model, lora: RandomLoRA, tmp_path: Path) -> None:
    file = lora.save(tmp_path / "x.safetensors")
    plan = model.plan(file)
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(InvalidRequestError, match="changed"):
        load_adapter(plan, model.loaded, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def whole_file(model: Model) -> bytes:
    return save(random_lora(model.published, 1, alpha=2.0, chosen=lambda name: "layers.0" in name).as_kohya())


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_file_does_more_than_load_or_be_refused(
    model: Model, whole_file: bytes, tmp_path: Path, data: st.DataObject
) -> None:
    """Bytes of the header, or of anything, changed, cut out or put in."""
    content = bytearray(whole_file)
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, (header if data.draw(st.booleans()) else len(content)) - 1))
        start = min(start, len(content) - 1)
        kind = data.draw(st.sampled_from(["change", "cut", "put"]))
        bytes_ = data.draw(st.one_of(st.binary(max_size=6), st.sampled_from([b"9", b"-1", b"null", b'"', b"[", b"F8"])))
        stop = start + data.draw(st.integers(1, 8)) if kind == "cut" else start + len(bytes_) * (kind == "change")
        content[start:stop] = b"" if kind == "cut" else bytes_
        content = content or bytearray(b"{")
    file = tmp_path / "x.safetensors"
    file.write_bytes(bytes(content))
    try:
        adapter = model.load(file)
    except OmniError:
        return
    for low in adapter.layers.values():
        assert low.down.isfinite().all() and all(up.matrix.isfinite().all() for up in low.ups)


class Folders:
    """An allowed folder, another, and a source that knows the first."""

    def __init__(self, root: Path, model: Model, lora: RandomLoRA) -> None:
        self.allowed, self.other = root / "allowed", root / "other"
        self.allowed.mkdir()
        self.other.mkdir()
        for folder in (self.allowed, self.other):
            lora.save(folder / f"{folder.name}.safetensors")
        (self.allowed / "inner").mkdir()
        lora.save(self.allowed / "inner" / "deep.safetensors")
        (self.allowed / "out.safetensors").symlink_to(self.other / "other.safetensors")
        (self.allowed / "in.safetensors").symlink_to("allowed.safetensors")
        (self.allowed / "folder.safetensors").mkdir()
        (self.allowed / "nothing.safetensors").symlink_to("gone")
        lora.save(self.allowed / ".hidden.safetensors")
        self.source = LoRASource(LoRAConfig((str(self.allowed),)), lambda: model.target, lambda: 4)


@pytest.fixture
def folders(tmp_path: Path, model: Model, lora: RandomLoRA) -> Folders:
    return Folders(tmp_path, model, lora)


def test_files_in_allowed_folders_are_found_by_name_and_by_path(folders: Folders) -> None:
    path = folders.allowed / "allowed.safetensors"
    loras = [LoRA("allowed"), LoRA("allowed.safetensors"), LoRA(path=str(path)), LoRA("a label", str(path)), LoRA("in")]
    plans = [folders.source.plans([lora])[0] for lora in loras]
    assert {plan.file.path.resolve() for plan in plans} == {path.resolve()}
    assert folders.source.key([LoRA("allowed")]) == folders.source.key([LoRA(path=str(path))])


@pytest.mark.parametrize(
    "name",
    [
        "other",
        "../other/other",
        "inner/deep",
        "out",
        "folder",
        "nothing",
        "..",
        ".hidden",
        "a\0b",
        "/etc/passwd",
        "*",
        "x" * 250,
        "é" * 200,
        "\ud800",
    ],
)
def test_other_names_are_refused(folders: Folders, name: str) -> None:
    with pytest.raises(InvalidRequestError, match="lora"):
        folders.source.plans([LoRA(name)])


def test_other_paths_are_refused(folders: Folders, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folders.other)
    allowed = folders.allowed
    for path in (
        folders.other / "other.safetensors",
        tmp_path / "link" / "other.safetensors",
        allowed / ".." / "other" / "other.safetensors",
        allowed / "inner" / "deep.safetensors",
        allowed / "out.safetensors",
        allowed / "gone.safetensors",
        allowed / ".hidden.safetensors",
        allowed,
        Path("/dev/zero"),
    ):
        with pytest.raises(InvalidRequestError, match="lora"):
            folders.source.plans([LoRA(path=str(path))])


def test_a_near_miss_is_told(folders: Folders) -> None:
    with pytest.raises(InvalidRequestError, match="did you mean 'allowed'"):
        folders.source.plans([LoRA("alowed")])


def test_adapters_larger_than_the_pool_are_refused(folders: Folders, model: Model) -> None:
    config = LoRAConfig((str(folders.allowed),), max_memory_mb=0.01)
    source = LoRASource(config, lambda: model.target, lambda: 4)
    with pytest.raises(InvalidRequestError, match=r"lora\.max_memory_mb"):
        source.plans([LoRA("allowed")])


def test_a_folder_that_is_none_is_an_error_of_the_config(tmp_path: Path, model: Model) -> None:
    with pytest.raises(ConfigError, match=r"lora\.folders"):
        LoRASource(LoRAConfig((str(tmp_path / "gone"),)), lambda: model.target, lambda: 4)
