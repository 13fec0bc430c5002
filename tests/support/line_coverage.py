"""`--min-coverage PERCENT`: which lines of the package the tests run, and an error where they are fewer.

SlipCover puts a call before each line when a module is imported, which costs the tests next to nothing, where a tracer
costs them half of their time again. Only what runs in the processes of the tests counts, not what those start.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import slipcover

PACKAGE = Path(__file__).parents[2] / "vllm_omni"
NUM_SHOWN, MAX_WIDTH = 10, 160  # files, and letters of each
# It would look through the frames of all threads for what it may take its calls out of, and so keep their values alive.
NEVER = sys.maxsize


class LineCoverage:
    """A plugin of pytest. Processes of pytest-xdist that run tests tell the one that shares these out what they ran."""

    def __init__(self, least_percent: float, package: Path = PACKAGE) -> None:
        self._least_percent, self._package = least_percent, package
        self._lines = slipcover.Slipcover(d_miss_threshold=NEVER)
        self._imports = slipcover.ImportManager(self._lines, slipcover.FileMatcher(sources=[package]))
        self._imports.__enter__()
        self._of_workers: list[dict[str, Any]] = []
        self._found: dict[str, Any] | None = None

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["lines"] = json.dumps(self._lines.get_coverage())
            return
        self._lines.source = [str(self._package)]  # files that nobody imported count as well
        self._found = self._lines.get_coverage()
        for each in self._of_workers:
            slipcover.merge_coverage(self._found, each)
        if self._percent < self._least_percent and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        if "lines" in getattr(node, "workeroutput", {}):
            self._of_workers.append(json.loads(node.workeroutput["lines"]))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._found is None:
            return
        terminalreporter.section("lines that tests run")
        files = self._found["files"]
        for path in sorted(files, key=lambda path: -len(files[path]["missing_lines"]))[:NUM_SHOWN]:
            missing = files[path]["missing_lines"]
            terminalreporter.line(f"{path}: {len(missing)} not: {', '.join(ranges(missing))}"[:MAX_WIDTH])
        good = self._percent >= self._least_percent
        words = f"{self._percent:.1f}% of the package, expected at least {self._least_percent:g}%"
        terminalreporter.line(words, **{"green" if good else "red": True})

    @property
    def _percent(self) -> float:
        assert self._found is not None
        return float(self._found["summary"]["percent_covered"])


def ranges(numbers: Sequence[int]) -> list[str]:
    """1, 2, 3, 7: `1-3`, `7`."""
    runs = [list(run) for _, run in groupby(enumerate(numbers), lambda each: each[1] - each[0])]
    return [f"{run[0][1]}-{run[-1][1]}" if len(run) > 1 else str(run[0][1]) for run in runs]
