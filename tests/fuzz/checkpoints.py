"""Mutated checkpoint folders: each is planned, loaded and asked once, or refused in words. An untouched one beside them
gives the same answer every time.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from random import Random
from typing import Any

from fuzz.mutation import mutate, mutate_bytes, mutate_text
from support.ar import TINY, make_model_folder
from support.dit import random_pipeline

from vllm_omni import Omni, SamplingParams
from vllm_omni.config.loader import load_config
from vllm_omni.errors import OmniError

GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
MAX_BYTES = 10 * 2**20  # of a file that is read to be changed
ODD_FILES = ("folder", "fifo", "device", "loop", "gone", "empty", "outside", "deep", "digits", "zeros")


class Checkpoints:
    """A language model with its tokenizer, and a pipeline of transformer, VAE and sampler."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._root = Path(self._folder.name)
        self._good = make_model_folder(self._root / "good")
        random_pipeline(self._root / "pipeline", cap_feat_dim=TINY["hidden_size"])
        self._expected = self._answer(self._good)
        self._try("pipeline", self._root / "pipeline")  # libraries load now
        self._count = 0

    def __call__(self, random: Random) -> str:
        kind = random.choice(["good", "good", "pipeline"])
        folder = self._root / "tried"
        shutil.copytree(self._root / kind, folder)
        self._count += 1
        try:
            for _ in range(random.choice([1, 1, 1, 2, 4])):
                damage(folder, random)
            return self._try(kind, folder)
        finally:
            shutil.rmtree(folder)
            if self._count % 50 == 0:
                assert self._answer(self._good) == self._expected, "an untouched folder gives another answer"

    def close(self) -> None:
        self._folder.cleanup()

    def _try(self, kind: str, folder: Path) -> str:
        with Omni(_config(kind, folder), progress=False) as omni:
            if kind == "pipeline":
                return "loaded"
            (output,) = omni.generate([[5, 6, 7]], GREEDY)
        if output.error is not None:
            raise output.error
        return "answered"

    def _answer(self, folder: Path) -> Any:
        with Omni(_config("good", folder), progress=False) as omni:
            (output,) = omni.generate([[5, 6, 7]], GREEDY)
        assert isinstance(output.error, OmniError | None)
        return output.token_ids


def _config(kind: str, folder: Path) -> Any:
    text = {"kind": "ar", "model": str(folder), "device": "cpu", "dtype": "float32", "kv_memory_mb": 4}
    if kind == "good":
        return load_config({"stages": {"text": text}, "outputs": ["text"]})
    writer = {**text, "model": str(folder.parent / "good"), "task": "encode", "outputs": {"states": {"layers": [-1]}}}
    image = {"kind": "dit", "model": str(folder), "device": "cpu", "inputs": {"prompt_embeds": "text.states"}}
    return load_config({"stages": {"text": writer, "image": image}, "outputs": ["image"]})


def damage(folder: Path, random: Random) -> None:
    """One file of the folder is changed."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    if not files:
        return
    path = random.choice(files)
    if path.stat().st_size > MAX_BYTES:
        return
    how = random.random()
    if how < 0.55 and path.suffix == ".json":
        path.write_text(_json(path, random), encoding="utf-8")
    elif how < 0.75:
        path.write_bytes(mutate_bytes(path.read_bytes(), random))
    elif how < 0.82 and path.suffix == ".safetensors":
        _change_header(path, random)
    elif how < 0.88:
        _add_index(folder, path, random)
    elif how < 0.92:
        path.unlink()
    else:
        _replace(path, random.choice(ODD_FILES))


def _json(path: Path, random: Random) -> str:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return "{}"
    if len(str(content)) > 20_000 or random.random() < 0.2:
        return mutate_text(path.read_text(encoding="utf-8"), random).encode("utf-8", "replace").decode()
    return json.dumps(mutate(content, random))


def _change_header(path: Path, random: Random) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
    except (ValueError, RecursionError):
        return
    changed = json.dumps(mutate(header, random)).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + length :])


def _add_index(folder: Path, path: Path, random: Random) -> None:
    tree = {"metadata": {"total_size": 1}, "weight_map": {"model.norm.weight": "model.safetensors", "x": path.name}}
    where = path.parent / f"{path.stem}.safetensors.index.json"
    if not where.exists():
        where.write_text(json.dumps(mutate(tree, random)))


def _replace(path: Path, kind: str) -> None:
    path.unlink()
    deep, digits = b'{"a":' * 30_000 + b"1" + b"}" * 30_000, b'{"a": ' + b"9" * 6_000 + b"}"
    contents = {"empty": b"", "deep": deep, "digits": digits}
    if kind in contents:
        path.write_bytes(contents[kind])
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "zeros":
        with path.open("wb") as file:
            file.truncate(200 * 2**20)
    else:
        path.symlink_to({"device": "/dev/zero", "loop": path.name, "gone": "gone", "outside": "/etc/hostname"}[kind])
