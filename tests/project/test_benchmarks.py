"""The benchmarks run, both sides do the same work, and a quick look writes no results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers.utils.logging
import pytest
import transformers.utils.logging
from support.server import ServerProcess
from support.sides import SideHere

from benchmarks import audio, autoencoders, dit, images, references, serving, text, videos
from benchmarks.run import main

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def results() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in RESULTS.glob("*")} if RESULTS.is_dir() else {}


def forked_server(*arguments: Any, fresh: bool) -> ServerProcess:
    """The same one, sooner there."""
    return ServerProcess(*arguments)


@pytest.fixture
def sides_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the sides tell the libraries to say is untold."""
    for suite in (audio, autoencoders, dit, images, references, serving, text, videos):
        monkeypatch.setattr(suite, "SideProcess", SideHere)
    monkeypatch.setattr(serving, "ServerProcess", forked_server)
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [library.get_verbosity() for library in libraries]
    yield
    for library, verbosity in zip(libraries, before, strict=True):
        library.set_verbosity(verbosity)
        library.enable_progress_bar()


def test_both_sides_make_the_same_pictures_steps_sounds_and_tokens(tmp_path: Path, sides_here: None) -> None:
    before = results()
    suites = ["images", "dit", "autoencoders", "references", "videos", "audio", "text"]
    assert main([*suites, "--quick", "--threads", "1", "--json", str(tmp_path / "found.json")]) == 0
    found = duels(tmp_path / "found.json")
    assert all(int(duel["agreement"].split()[0]) <= 2 for duel in found["images"])
    assert [float(duel["agreement"].split()[0]) for duel in found["references"]] == [0.0]
    steps = [duel for duel in found["dit"] if duel["dtype"] == "float32"]
    assert steps and all(float(duel["agreement"].split()[0]) < 1e-2 for duel in steps)
    most = {"float32": 1, "bfloat16": 16}  # of 255
    assert all(int(duel["agreement"].split()[0]) <= most[duel["case"].split()[-1]] for duel in found["autoencoders"])
    assert all(float(duel["agreement"].split()[0]) < 2e-2 for duel in found["videos"])
    assert all(float(duel["agreement"].split()[0]) < 1e-3 for duel in found["audio"])
    assert all(duel["agreement"] == "100%" for duel in found["text"])
    assert results() == before


def duels(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Of each suite, all of which were timed."""
    found = {name: suite["figures"]["duels"] for name, suite in json.loads(path.read_text()).items()}
    for duel in [duel for suite in found.values() for duel in suite]:
        assert duel["us_s"][0] > 0 and duel["ratio"] == pytest.approx(duel["peer_s"][0] / duel["us_s"][0])
    return found


def test_a_crowd_is_answered_to_the_last_and_beyond_the_queue_refused(tmp_path: Path, sides_here: None) -> None:
    before = results()
    assert main(["serving", "--quick", "--threads", "1", "--json", str(tmp_path / "found.json")]) == 0
    figures = json.loads((tmp_path / "found.json").read_text())["serving"]["figures"]
    assert figures["crowd"] == {"200": 12}
    refused = figures["refused"]
    # four may wait; who of the rest may run at once depends on how many come before the first step ends
    assert refused.keys() == {"200", "429"} and sum(refused.values()) == 12 and refused["200"] >= 4
    assert all(len(added) >= 1 for added in figures["first_token_added_s"].values())
    assert figures["ratio"] > 0 and set(figures["p99_ms"]) == {"/health", "/metrics"}
    assert results() == before


@pytest.mark.parametrize("arguments", [["pictures"], ["images", "--threads", "many"]])
def test_a_wrong_command_line_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2 and arguments[-1] in capsys.readouterr().err
