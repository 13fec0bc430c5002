"""What stages in processes of their own take from large libraries is imported before the first is started."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from vllm_omni.entrypoints.loading import open_pipeline, prepare_stages
from vllm_omni.utils.children import fork_client
from vllm_omni.utils.children.child import start_child
from vllm_omni.utils.children.messages import read_message, write_message

pytestmark = pytest.mark.skipif(not fork_client.can_fork(), reason="this system cannot fork them")


def modules_of_a_child() -> set[str]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child = start_child("support.child_main", [theirs.fileno()])
        write_message(ours, {"do": "tell"})
        about: dict[str, Any] = read_message(ours) or {}
        assert child.reap() == 0
        return set(about["modules"])


@pytest.mark.parametrize("apart", [True, False], ids=["apart", "in the server"])
def test_a_process_has_what_a_stage_takes_from_diffusers(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.setenv("A_NEW", f"fork server, {apart}")
    monkeypatch.setattr(fork_client, "_learned", {})
    prepare_stages([open_pipeline("tiny_image", apart=apart)])
    assert ("diffusers.models.autoencoders.autoencoder_kl" in modules_of_a_child()) is apart
