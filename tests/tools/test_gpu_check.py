"""The check of a machine with a GPU, as far as a CPU can show: it runs from its tests to its figures, says what is
wrong with its command line, and a case that fails costs no other its figures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "gpu_check.sh"


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["OMP_NUM_THREADS"] = "1"
    command = [str(SCRIPT), "--python", sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)


def test_a_dry_run_tests_and_measures_with_the_code_of_the_gpu(tmp_path: Path) -> None:
    found = tmp_path / "figures.json"
    done = check("--dry-run", "--output", str(found))
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(found.read_text())
    assert figures["is_dry_run"] and figures["machine"]["gpu"] is None
    assert figures["tests"]["tests"] >= 30 and figures["tests"]["failed"] == []
    cases = figures["cases"]
    assert cases["nano-vllm's workload, attention auto"]["tokens_per_s"] > 0
    assert cases["pictures"]["4 pictures, s"] > 0 and cases["decode, sdpa"]["2 sequences, tokens/s"] > 0
    assert not any("error" in case or "left_out" in case for case in cases.values()), cases
    compared = {f"as fast as diffusers: {count} pictures" for count in (1, 4)}
    assert figures["ratios"].keys() == compared | {
        "as fast as transformers: 2 sequences",
        "as fast as greedy tokens, drawn ones",
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dry-run"], "say with --output where they go"),
        (["--nam", "x"], "got --nam, expected an option"),
        (["--name"], "--name: got nothing, expected a value"),
        (["--dry-run", "--output", "x", "--name", "a/b"], "expected letters, digits, dots and dashes"),
    ],
)
def test_a_wrong_command_line_is_refused_in_words(arguments: list[str], words: str) -> None:
    done = check(*arguments)
    assert done.returncode == 2 and words in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_is_missing() -> None:
    done = check()
    assert done.returncode == 2 and "torch sees no CUDA device" in done.stderr


def test_help_says_which_wheels_to_carry() -> None:
    done = check("--help")
    assert done.returncode == 0 and "pip wheel --wheel-dir wheels" in done.stdout


class Cases:
    """Stands in for a Bench."""

    def cases(self) -> Any:
        yield "good", lambda: {"s": 1.0}
        yield "bad", self.fails
        yield "also good", lambda: {"s": 2.0}

    def fails(self) -> dict[str, Any]:
        raise RuntimeError("out of luck")


def test_a_case_that_fails_leaves_its_error_and_the_others_their_figures(tmp_path: Path) -> None:
    content: dict[str, Any] = {"cases": {}}
    gpu.run_cases(Cases(), content, tmp_path / "x.json", budget_s=100)  # type: ignore[arg-type]
    assert json.loads((tmp_path / "x.json").read_text()) == content
    assert content["cases"] == {
        "good": {"s": 1.0},
        "bad": {"error": "RuntimeError: out of luck"},
        "also good": {"s": 2.0},
    }


def test_no_case_begins_beyond_the_budget(tmp_path: Path) -> None:
    content: dict[str, Any] = {"cases": {}}
    gpu.run_cases(Cases(), content, tmp_path / "x.json", budget_s=-1)  # type: ignore[arg-type]
    assert all("left_out" in case for case in content["cases"].values()) and len(content["cases"]) == 3


def test_failed_tests_are_named_in_the_figures(tmp_path: Path) -> None:
    (tmp_path / "t.xml").write_text(
        '<testsuites><testsuite tests="2" failures="1" errors="0" skipped="0"><testcase classname="a" name="b">'
        '<failure message="m"/></testcase><testcase classname="a" name="c"/></testsuite></testsuites>'
    )
    found = gpu.tests_found(tmp_path / "t.xml")
    assert found == {"tests": 2, "failures": 1, "errors": 0, "skipped": 0, "failed": ["a.b"]}
    assert gpu.tests_found(tmp_path / "none.xml") is None
