"""docs/serving.md is true: its commands and its Python run, and it names every flag, route, metric and file."""

from __future__ import annotations

import argparse
import asyncio
import re
import shlex
import subprocess
import types
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from support.server import ServerProcess

from vllm_omni.config.loader import load_config
from vllm_omni.entrypoints.cli import build_parser
from vllm_omni.entrypoints.server.app import create_app
from vllm_omni.entrypoints.server.http.api_error import ANSWERS
from vllm_omni.entrypoints.server.models import ModelTable
from vllm_omni.entrypoints.server.monitoring.metrics import ServerMetrics
from vllm_omni.entrypoints.server.runs import RunTable
from vllm_omni.entrypoints.server.settings import ServerSettings

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "serving.md"
TEXT = PAGE.read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"
DOCKERFILES = sorted((ROOT / "tools" / "docker").glob("Dockerfile.*"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    whole = "".join(blocks("bash") + blocks("sh")).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in whole.splitlines() if line.strip()]


def rows(header: str) -> list[list[str]]:
    """The rows of the table whose first header cell is this."""
    (table,) = re.findall(rf"^\| {header} \|.*\n\|[-|]+\n((?:\|.*\n)+)", TEXT, flags=re.MULTILINE)
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in table.splitlines()]


def flags_of(*words: str) -> set[str]:
    """Every flag of a command."""
    parser = build_parser()
    for word in words:
        (commands_of,) = [found for found in parser._actions if isinstance(found, argparse._SubParsersAction)]
        parser = commands_of.choices[word]
    return {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")} - {"--help"}


@pytest.fixture(scope="module")
def table() -> ModelTable:
    return ModelTable({"tiny-image": load_config("tiny_image")})


# Snippets, against a real server


def test_python_of_the_page_runs(server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("serving_page")
    for block in blocks("python"):
        assert ADDRESS in block
        exec(compile(block.replace(ADDRESS, server.address), str(PAGE), "exec"), module.__dict__)
    assert (tmp_path / "melody.wav").read_bytes().startswith(b"RIFF")
    assert (tmp_path / "star-completed.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "star-partial_image.png").is_file()


def test_every_curl_of_the_page_gets_an_answer(server: ServerProcess, tmp_path: Path) -> None:
    asked = [[word.replace(ADDRESS, server.address) for word in line] for line in commands() if line[0] == "curl"]
    assert len(asked) >= 3
    for line in asked:
        subprocess.run([*line, "--fail"], cwd=tmp_path, check=True, timeout=120, capture_output=True)


def test_commands_of_the_page_exist() -> None:
    ours = [line[1:] for line in commands() if line[0] == "vllm-omni"]
    assert len(ours) >= 5
    for arguments in ours:
        build_parser().parse_args(arguments)
    mixes = {arguments[arguments.index("--mix") + 1] for arguments in ours if "--mix" in arguments}
    assert mixes and all((ROOT / mix).is_file() for mix in mixes)


# Lists


def test_every_flag_of_serve_and_no_other_stands_in_the_table() -> None:
    listed = {flag for row in rows("Flag") for flag in re.findall(r"--[a-z-]+", row[0])}
    assert listed == flags_of("serve")
    known = flags_of("serve") | flags_of("bench", "serve") | flags_of("bench", "offline")
    of_others = {"--fail", "--no-progress-meter", "--rm", "--gpus", "--format", "--seconds", "--help"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXT)) <= known | of_others


def test_every_route_of_the_api_stands_in_the_table(table: ModelTable) -> None:
    paths = create_app(table, ServerSettings(ui=True), print).openapi()["paths"]
    served = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    assert len(served) >= 20
    listed = {route for row in rows("Route") for route in re.findall(r"`([^`]+)`", row[0])}
    assert {route.replace(":path}", "}") for route in served} <= listed


def test_every_metric_and_no_other_stands_in_the_table_with_its_kind(table: ModelTable) -> None:
    text = asyncio.run(ServerMetrics(table, RunTable()).render()).decode()
    found = {family.name: family.type for family in text_string_to_metric_families(text)}
    ours = {f"{name}_total" if kind == "counter" else name: kind for name, kind in found.items() if "omni" in name}
    assert {row[0].strip("`"): row[1] for row in rows("Metric")} == ours
    for expression in blocks("promql"):
        for name in re.findall(r"vllm_omni_\w+", expression):
            assert name in ours or ours[name.removesuffix("_bucket")] == "histogram"


def test_every_status_that_an_error_may_have_stands_in_the_table() -> None:
    source = "".join(path.read_text() for path in (ROOT / "vllm_omni/entrypoints/server").rglob("*.py"))
    raised = {*re.findall(r"ApiError\(\s*(\d{3})", source), *(str(status) for _, status, _, _ in ANSWERS)}
    assert {"400", "429", "504"} <= raised <= {row[0] for row in rows("Status")}


def test_links_and_files_that_are_named_exist() -> None:
    titles = re.findall(r"^#+ (.*)$", TEXT, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXT):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        else:
            assert (PAGE.parent / target.partition("#")[0]).exists(), target
    for name in re.findall(r"`(tools/[\w./]+)`", TEXT):
        assert (ROOT / name).is_file(), name


# Deployment


def test_the_scrape_config_is_of_our_port() -> None:
    (job,) = yaml.safe_load(blocks("yaml")[0])["scrape_configs"]
    assert job["static_configs"] == [{"targets": [ADDRESS.removeprefix("http://")]}]


def test_a_service_manager_waits_longer_than_the_server_drains() -> None:
    (unit,) = blocks("ini")
    (start,) = re.findall(r"^ExecStart=\S+/vllm-omni (.*)$", unit, flags=re.MULTILINE)
    args: Any = build_parser().parse_args(shlex.split(start))
    assert args.drain_s < float(re.findall(r"^TimeoutStopSec=(\d+)$", unit, flags=re.MULTILINE)[0])


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.suffix[1:])
def test_an_image_has_two_stages_no_rights_and_looks_at_ready(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\nFROM ") == 2 and text.index("\nUSER ") > text.rindex("\nFROM ")
    assert "/ready" in text.split("HEALTHCHECK")[1].split("ENTRYPOINT")[0]
    words = [part for block in re.findall(r"^(?:ENTRYPOINT|CMD) \[(.*)\]$", text, flags=re.MULTILINE) for part in
             re.findall(r'"([^"]*)"', block)]  # fmt: skip
    build_parser().parse_args(words[1:])
    (wanted,) = re.findall(r'"(torch[^"]*)"', text)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert wanted in project
    named = re.findall(r"/source/([\w./-]+)|-f (\S+)", text)
    assert named and all((ROOT / (file or dockerfile)).is_file() for file, dockerfile in named)
    for extra in re.findall(r'"/source\[(.*?)\]"', text)[0].split(","):
        assert f"\n{extra} = [" in project
    assert {row.suffix for row in DOCKERFILES} == {".cpu", ".cuda"}
