"""The suite beside the qwen-tts package, as far as it goes without that package's environment."""

from __future__ import annotations

from pathlib import Path

from benchmarks import speech_peers
from benchmarks.measure import Options


def test_without_its_environment_the_peer_is_named_and_nothing_is_run(tmp_path: Path) -> None:
    report = speech_peers.run(Options(threads=1, is_quick=True, peers=str(tmp_path)))
    assert not report.tables
    (note,) = report.notes
    assert "python -m tools.peers qwen-tts" in note


def test_texts_are_of_one_length_and_never_the_same() -> None:
    case = speech_peers.Case(3, 5)
    texts = [text for repeat in range(4) for text in case.texts(repeat)]
    assert {len(text) for text in texts} == {speech_peers.NUM_LETTERS} and len(set(texts)) == 12
    assert case.texts(1) == case.texts(1)
