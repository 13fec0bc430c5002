"""What a checkpoint folder may hold: whatever stands there, loading ends in words, soon, and without much memory."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.ar import make_model_folder

from vllm_omni.config.loader import load_config
from vllm_omni.errors import CheckpointError, ConfigError, OmniError
from vllm_omni.executor.memory import plan_memory
from vllm_omni.executor.omni_executor import OmniExecutor
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.utils.checkpoint_files import check_folder
from vllm_omni.utils.files import assets_folder, read_json

DEEP = b'{"a": ' * 30_000 + b"1" + b"}" * 30_000
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model") / "qwen")


@pytest.fixture
def model(language_model: Path, tmp_path: Path) -> Iterator[Path]:
    yield Path(shutil.copytree(language_model, tmp_path / "model"))


def open_text(folder: Path) -> Pipeline:
    stages = {"text": {"kind": "ar", "model": str(folder), "device": "cpu"}}
    pipeline = Pipeline(load_config({"stages": stages, "outputs": ["text"]}))
    plan_memory(pipeline)
    return pipeline


def load_text(folder: Path) -> None:
    OmniExecutor(open_text(folder)).shutdown()


def edit(folder: Path, name: str, **changes: Any) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**content, **changes}))


def replace(folder: Path, name: str, make: Damage) -> None:
    (folder / name).unlink(missing_ok=True)
    make(folder / name)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def outside(path: Path) -> None:
    target = path.parent.parent / f"outside-{path.name}"
    shutil.copy(assets_folder() / "tiny-speech" / "config.json", target)
    path.symlink_to(target)


def a_socket(path: Path) -> None:
    socket.socket(socket.AF_UNIX).bind(os.path.relpath(path))


IN_PLACE_OF_A_FILE = {
    "folder": (Path.mkdir, "a folder"),
    "fifo": (os.mkfifo, "a named pipe"),
    "socket": (a_socket, "a device or socket"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "a device"),
    "loop": (loop, "cannot be read|missing"),
    "link to nothing": (lambda path: path.symlink_to("gone"), "missing"),
    "link outside": (outside, "outside of the folder"),
}


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", IN_PLACE_OF_A_FILE)
def test_what_is_no_file_of_the_folder_is_refused_by_its_name(
    model: Path, file: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, words = IN_PLACE_OF_A_FILE[kind]
    monkeypatch.chdir(model)  # the path of a socket may not be long
    replace(model, file, make)
    with pytest.raises(CheckpointError, match=f"{file}.*({words})"):
        open_text(model)


@pytest.mark.parametrize("file", ["tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("kind", ["fifo", "device", "link outside"])
def test_side_files_that_libraries_open_are_looked_at_as_well(model: Path, file: str, kind: str) -> None:
    replace(model, file, IN_PLACE_OF_A_FILE[kind][0])
    with pytest.raises(CheckpointError, match=file):
        load_text(model)


CONTENT: dict[str, tuple[bytes, str]] = {
    "deep": (DEEP, "nested too deeply"),
    "long integer": (b'{"vocab_size": ' + b"9" * 6_000 + b"}", "an integer of 6000 digits"),
    "list": (b"[1]", "expected an object"),
    "empty": (b"", "not valid JSON"),
    "no text": (b"\xff\xfe\x00", "not valid JSON"),
}


@pytest.mark.parametrize("kind", CONTENT)
def test_json_that_is_none_is_refused_with_its_file(model: Path, kind: str) -> None:
    content, words = CONTENT[kind]
    for file in ("config.json", "generation_config.json"):
        before = (model / file).read_bytes()
        (model / file).write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{file}.*{words}"):
            open_text(model)
        (model / file).write_bytes(before)


def test_a_side_file_is_bounded(model: Path) -> None:
    with (model / "config.json").open("wb") as file:
        file.truncate(100 * 2**20)  # a hole: it takes no room
    with pytest.raises(CheckpointError, match=r"config\.json: got more than"):
        read_json(model / "config.json")


@pytest.mark.parametrize("file", [["a"], "..", "../model.safetensors", ".", "", None, 3, "config.json", "/etc/passwd"])
def test_a_weight_map_names_files_of_its_folder_alone(model: Path, file: object) -> None:
    index = {"metadata": {}, "weight_map": {"model.norm.weight": file}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    with pytest.raises(CheckpointError, match=r"index\.json: weight_map: 'model\.norm\.weight': got "):
        open_text(model)


ODD: list[Any] = ["x", [], {}, [[1]], None, -1, 0, 1.5, True, 1e300, 2**60]


@pytest.mark.parametrize("value", ODD, ids=repr)
@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "head_dim", "rope_parameters", "architectures"])
def test_a_wrong_type_in_a_language_models_config_is_said_with_the_file(model: Path, key: str, value: Any) -> None:
    edit(model, "config.json", **{key: value})
    try:
        load_text(model)
    except (CheckpointError, ConfigError) as error:
        assert str(model) in str(error)
        assert len(str(error)) < 1000
    else:
        is_absent = not value and key == "architectures"  # told by the model type then
        assert is_absent or value in (None, {}, []) or key == "rope_parameters", "this should have been refused"


@pytest.mark.parametrize("value", ODD, ids=repr)
@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("transformer/config.json", "dim"),
        ("transformer/config.json", "axes_dims"),
        ("transformer/config.json", "n_heads"),
        ("transformer/config.json", "all_patch_size"),
        ("vae/config.json", "sample_size"),
        ("vae/config.json", "block_out_channels"),
        ("scheduler/scheduler_config.json", "num_train_timesteps"),
        ("scheduler/scheduler_config.json", "_class_name"),
        ("model_index.json", "_class_name"),
    ],
)
def test_a_wrong_type_in_a_pipelines_config_is_said_with_the_file(
    tmp_path: Path, file: str, key: str, value: Any
) -> None:
    folder = tmp_path / "tiny-image"
    shutil.copytree(assets_folder() / "tiny-image", folder, symlinks=True)
    edit(folder, file, **{key: value})
    try:
        Pipeline(load_config("tiny_image", model=str(folder)))
    except (CheckpointError, ConfigError) as error:
        assert "tiny-image" in str(error) and len(str(error)) < 1000


def test_planning_takes_no_memory_that_a_config_names(model: Path) -> None:
    import tracemalloc

    for key in ("num_hidden_layers", "head_dim", "vocab_size", "max_position_embeddings", "intermediate_size"):
        before = (model / "config.json").read_bytes()
        edit(model, "config.json", **{key: 900_000_000})
        tracemalloc.start()
        try:
            open_text(model)
        except OmniError:
            pass
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        (model / "config.json").write_bytes(before)
        assert peak < 50 * 2**20, key


def test_a_hub_snapshot_may_link_into_its_blobs_and_nowhere_else(model: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--name"
    snapshot, blobs = repository / "snapshots" / "rev", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for index, path in enumerate(sorted(model.iterdir())):
        path.rename(blobs / str(index))
        (snapshot / path.name).symlink_to(f"../../blobs/{index}")
    open_text(snapshot)
    replace(snapshot, "config.json", lambda path: path.symlink_to("../../../outside.json"))
    (tmp_path / "outside.json").write_text("{}")
    with pytest.raises(CheckpointError, match="outside of the folder"):
        open_text(snapshot)


def test_parts_of_a_pipeline_may_share_a_file_by_a_link(tmp_path: Path) -> None:
    for part in ("one", "two"):
        (tmp_path / part).mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "one" / "config.json").write_text('{"a": 1}')
    (tmp_path / "two" / "config.json").symlink_to("../one/config.json")
    check_folder(tmp_path)
    assert read_json(tmp_path / "two" / "config.json") == {"a": 1}


@pytest.mark.parametrize("name", ["x" * 300, "owner/" + "x" * 300, "~nosuchuser/model", "a\0b", "", "owner/name/../.."])
def test_a_name_that_no_model_can_have_is_refused_in_words(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OmniError, match="model: "):
        Pipeline(load_config("tiny_image", model=name))


def test_a_library_that_panics_over_a_file_is_said_as_any_other(model: Path) -> None:
    from vllm_omni.utils.checkpoint_files import reading

    panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})
    with (
        pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read \(PanicException: out of range"),
        reading("tokenizer.json"),
    ):
        raise panic("out of range")
    with pytest.raises(KeyboardInterrupt), reading("tokenizer.json"):
        raise KeyboardInterrupt
