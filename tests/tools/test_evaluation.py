"""Evaluation tools keep their figures only where somebody says so."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from tools.tiny.audio import evaluate as audio
from tools.tiny.image import evaluate as image
from tools.tiny.speech import evaluate as speech

RESULTS = Path("benchmarks/results")
TOOLS = {
    "audio": (audio.main, ["--count", "1", "--requests", "1", "--steps", "1"]),
    "image": (image.main, ["--count", "1", "--steps", "1"]),
    "speech": (speech.main, ["--count", "1"]),
}
NEEDS_VOICE = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="speech is judged against espeak-ng")


@pytest.mark.parametrize("name", ["audio", "image", pytest.param("speech", marks=NEEDS_VOICE)])
def test_results_are_written_only_when_asked(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main, arguments = TOOLS[name]
    tracked = tmp_path / RESULTS / f"tiny_{name}.json"
    tracked.parent.mkdir(parents=True)
    tracked.write_text("as before")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
    main()
    assert tracked.read_text() == "as before" and capsys.readouterr().out
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == [tracked]


def test_results_go_where_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main, arguments = TOOLS["image"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments, "--json", str(tmp_path / "x.json")])
    main()
    assert json.loads((tmp_path / "x.json").read_text())["count"] == 1


def test_benchmarks_keep_their_figures_only_with_write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from benchmarks import run
    from benchmarks.measure import Report, Table

    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(run.limits, "measure", lambda options: None)
    monkeypatch.setitem(run.SUITES, "text", lambda options, bounds: Report("text", [Table("t", ["a"], [["1"]])], []))
    assert run.main(["text", "--repeats", "1"]) == 0 and not list(tmp_path.iterdir())
    assert run.main(["text", "--repeats", "1", "--write"]) == 0 and (tmp_path / "text.json").is_file()
    with pytest.raises(SystemExit):
        run.main(["text", "--quick", "--write"])
