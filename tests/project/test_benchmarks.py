"""The benchmarks run, both sides do the same work, and a quick look writes no results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def results() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in RESULTS.glob("*")} if RESULTS.is_dir() else {}


def test_both_sides_make_the_same_pictures_sounds_and_tokens(tmp_path: Path) -> None:
    before = results()
    command = [sys.executable, "benchmarks/run.py", "images", "dit", "audio", "text", "--quick", "--threads", "1"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "found.json")], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    for duel in [duel for suite in found.values() for duel in suite["figures"]["duels"]]:
        assert duel["us_s"][0] > 0 and duel["ratio"] == pytest.approx(duel["peer_s"][0] / duel["us_s"][0])
    assert all(int(duel["agreement"].split()[0]) <= 2 for duel in found["images"]["figures"]["duels"])
    steps = [duel for duel in found["dit"]["figures"]["duels"] if duel["dtype"] == "float32"]
    assert steps and all(float(duel["agreement"].split()[0]) < 1e-2 for duel in steps)
    assert all(float(duel["agreement"].split()[0]) < 1e-3 for duel in found["audio"]["figures"]["duels"])
    assert all(duel["agreement"] == "100%" for duel in found["text"]["figures"]["duels"])
    assert results() == before


def test_a_crowd_is_answered_to_the_last_and_beyond_the_queue_refused(tmp_path: Path) -> None:
    before = results()
    command = [sys.executable, "benchmarks/run.py", "serving", "--quick", "--threads", "1"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "found.json")], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "found.json").read_text())["serving"]["figures"]
    assert figures["crowd"] == {"200": 12}
    refused = figures["refused"]
    # four may wait; who of the rest may run at once depends on how many come before the first step ends
    assert refused.keys() == {"200", "429"} and sum(refused.values()) == 12 and refused["200"] >= 4
    assert figures["ratio"] > 0 and set(figures["p99_ms"]) == {"/health", "/metrics"}
    assert results() == before


@pytest.mark.parametrize("arguments", [["pictures"], ["images", "--threads", "many"]])
def test_a_wrong_command_line_is_refused(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "benchmarks/run.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert arguments[-1] in done.stderr
