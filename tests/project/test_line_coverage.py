"""`--min-coverage`: the lines that tests run are counted, in one process and in several; too few are an error."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.line_coverage import ranges

TESTS = Path(__file__).parents[1]
# Of eight lines the two tests run five, each of them in its own process where there are two.
FILES = {
    "made/__init__.py": "",
    "made/sides.py": "def left():\n    side = 'left'\n    return side\n\n\ndef right():\n    return 'right'\n",
    "made/nobody.py": "def forgotten():\n    number = 1\n    return number\n",
    "test_left.py": "from made.sides import left\n\n\ndef test_left():\n    assert left() == 'left'\n",
    "test_right.py": "from made.sides import right\n\n\ndef test_right():\n    assert right() == 'right'\n",
    "conftest.py": (
        "from pathlib import Path\nfrom support.line_coverage import LineCoverage\n\n\n"
        "def pytest_addoption(parser):\n    parser.addoption('--least', type=float)\n\n\n"
        "def pytest_configure(config):\n    package = Path(__file__).parent / 'made'\n"
        "    config.pluginmanager.register(LineCoverage(config.getoption('--least'), package))\n"
    ),
}


@pytest.mark.parametrize("processes", ["0", "2"])
@pytest.mark.parametrize(("least", "code"), [("60", 0), ("70", 1)])
def test_lines_are_counted_and_too_few_are_an_error(tmp_path: Path, processes: str, least: str, code: int) -> None:
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    command = [sys.executable, "-m", "pytest", "-p", "xdist", "-n", processes, "--dist", "loadfile", "--least", least]
    paths = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{tmp_path}"}
    for name in [name for name in paths if name.startswith("PYTEST_")]:  # of the processes that share these tests out
        del paths[name]
    paths["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    done = subprocess.run(command, cwd=tmp_path, env=paths, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    percent = re.search(r"^([\d.]+)% of the package, expected at least (\d+)%$", done.stdout, re.MULTILINE)
    assert percent and (float(percent[1]), percent[2]) == (62.5, least), done.stdout
    assert re.search(r"made/nobody\.py: 3 not: 1-3$", done.stdout, re.MULTILINE), done.stdout
    assert " passed in " in done.stdout.splitlines()[-1]


def test_lines_that_follow_each_other_are_told_as_one() -> None:
    assert ranges([1, 2, 3, 7, 9, 10]) == ["1-3", "7", "9-10"]
