"""What is known of a model is read at load: a request opens no file and asks no hub."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from vllm_omni import DiffusionParams, Omni, SamplingParams
from vllm_omni.config.loader import load_config

_watching: list[list[str]] = []
_hooked: list[bool] = []


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event in ("open", "socket.connect", "socket.getaddrinfo", "os.listdir", "os.scandir"):
        _watching[-1].append(f"{event} {arguments[0]}")


@contextmanager
def accesses() -> Iterator[list[str]]:
    """Every file that is opened, every folder that is listed and every connection, from any thread."""
    if not _hooked:
        sys.addaudithook(_note)  # it cannot be removed, so it is added once
        _hooked.append(True)
    _watching.append([])
    try:
        yield _watching[-1]
    finally:
        _watching.pop()


CASES = {
    "tiny_image": ("a red circle", DiffusionParams(num_inference_steps=2, guidance_scale=2.0)),
    "tiny_omni": ("show me a scarlet ball and play a C4 on a string", DiffusionParams(num_inference_steps=2)),
    "tiny_speech": ("read 3", {"talker": SamplingParams(max_tokens=8, temperature=0.0)}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_request_opens_no_file_and_asks_no_hub(name: str) -> None:
    prompt, params = CASES[name]
    with Omni(name, progress=False) as omni:
        omni.generate(prompt, params)  # the first one imports what libraries load late
        with accesses() as found:
            (output,) = omni.generate(f"{prompt} ", params)
    assert output.error is None and found == []


def test_a_hub_repository_is_looked_up_once_at_load_however_many_stages_name_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm_omni.utils.files import assets_folder

    asked: list[str] = []

    def snapshot_download(repository: str, **options: Any) -> str:
        asked.append(repository)
        return str(assets_folder() / "tiny-image")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with Omni(load_config("tiny_image", model="owner/name"), progress=False) as omni:
        for prompt in ("a red circle", "a blue square"):
            (output,) = omni.generate({"prompt": prompt}, DiffusionParams(num_inference_steps=1))
            assert output.error is None
    assert asked == ["owner/name"]


def test_an_access_is_noticed(tmp_path: Any) -> None:
    (tmp_path / "x").write_text("x")
    with accesses() as found:
        (tmp_path / "x").read_text()
    assert any("open" in each for each in found)
