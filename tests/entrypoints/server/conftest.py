"""One server for all tests of routes, with the models that ship and a random text model; real clients of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from openai import OpenAI
from support.ar import make_model_folder
from support.server import ServerProcess

CONFIGS = ("tiny_omni", "tiny_image", "tiny_audio", "tiny_speech")


@pytest.fixture(scope="session")
def words_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random language model that writes text, and what an encoder of its kind gives as vectors."""
    folder = tmp_path_factory.mktemp("words")
    model = make_model_folder(folder / "model")
    stages = {"text": {"kind": "ar", "model": str(model), "task": "generate", "defaults": {"temperature": 0.0}}}
    (folder / "words.yaml").write_text(yaml.safe_dump({"name": "words", "stages": stages, "outputs": ["text"]}))
    encoder = {"text": {"kind": "ar", "model": str(model), "task": "encode", "outputs": {"states": {"layers": [-1]}}}}
    encoder["text"]["chat_template"] = False
    (folder / "vectors.yaml").write_text(
        yaml.safe_dump({"name": "vectors", "stages": encoder, "outputs": ["text.states"]})
    )
    return folder / "words.yaml"


@pytest.fixture(scope="session")
def server(words_config: Path) -> Iterator[ServerProcess]:
    vectors = words_config.with_name("vectors.yaml")
    with ServerProcess(
        [*CONFIGS, f"words={words_config}", f"vectors={vectors}"], ["--ui", "--allow-restart"]
    ) as process:
        yield process


@pytest.fixture(scope="session")
def client(server: ServerProcess) -> OpenAI:
    return OpenAI(base_url=server.base_url, api_key="none", max_retries=0, timeout=120)
