"""The files around the package agree with each other and with it: versions, make, CI, pages for contributors."""

from __future__ import annotations

import ast
import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from vllm_omni import DiffusionParams, Omni, registry

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "vllm_omni"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
REQUIRED = {canonicalize_name(found.name): found for found in map(Requirement, PROJECT["project"]["dependencies"])}
EXTRAS = {
    canonicalize_name(found.name): found
    for extra in ("server", "otel")
    for found in map(Requirement, PROJECT["project"]["optional-dependencies"][extra])
}
TOOLS = {canonicalize_name(found.name): found for found in map(Requirement, PROJECT["dependency-groups"]["dev"])}
UNPINNED = {"torch"}
PAGES = [ROOT / "CONTRIBUTING.md", ROOT / "docs" / "architecture.md", ROOT / "docs" / "decisions.md"]
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def pins(name: str) -> dict[str, str]:
    """Name -> exact version, of a constraints file of nothing else: no hosts, no hashes, no options."""
    lines = [line for line in read(name).splitlines() if not line.startswith("#")]
    found = {}
    for line in lines:
        assert re.fullmatch(r"[a-z0-9.-]+==[A-Za-z0-9.+!]+", line), line
        project, _, version = line.partition("==")
        assert project == canonicalize_name(project) and project not in found, line
        found[project] = version
    assert list(found) and "torch" not in found
    return found


def lower_bound(requirement: Requirement) -> str:
    (bound,) = [part.version for part in requirement.specifier if part.operator == ">="]
    return bound


# Versions


def test_every_direct_dependency_but_torch_is_pinned_to_a_version_that_is_allowed() -> None:
    pinned = pins("constraints.txt")
    wanted = {**REQUIRED, **TOOLS}
    assert wanted.keys() - pinned.keys() == UNPINNED
    for name, requirement in wanted.items():
        assert name in UNPINNED or requirement.specifier.contains(pinned[name]), requirement


def test_pins_bring_nothing_of_a_cuda_build_and_say_how_to_move_them() -> None:
    assert not [name for name in pins("constraints.txt") if name.startswith(("nvidia", "cuda", "triton"))]
    comments = [line for line in read("constraints.txt").splitlines() if line.startswith("#")]
    assert "make pins" in " ".join(comments)


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    requirements = {**REQUIRED, **EXTRAS}
    bounds = {name: lower_bound(requirement) for name, requirement in requirements.items() if name not in UNPINNED}
    oldest = pins("constraints-oldest.txt")
    assert oldest.keys() == bounds.keys()
    for name, version in oldest.items():
        assert requirements[name].specifier.contains(version)
        assert version == bounds[name] or version.removesuffix(".0") == bounds[name], name


def test_what_the_package_imports_is_required() -> None:
    """Tools of development are no part of it: `rich` is, and only the benchmarks use it."""
    server = {path for name in ("server", "bench") for path in (PACKAGE / "entrypoints" / name).rglob("*.py")}
    foreign = foreign_packages(set(PACKAGE.rglob("*.py")) - server)
    assert foreign - WHERE_INSTALLED <= REQUIRED.keys()
    assert REQUIRED.keys() - foreign <= IMPORTED_BY_OTHERS
    beyond = foreign_packages(server) - REQUIRED.keys()
    assert beyond <= EXTRAS.keys() | {"opentelemetry"}
    assert EXTRAS.keys() - beyond <= IMPORTED_BY_OTHERS


def test_the_tools_of_development_bring_every_extra_that_tests_need() -> None:
    for name, requirement in EXTRAS.items():
        assert TOOLS[name].specifier == requirement.specifier


def foreign_packages(files: set[Path]) -> set[str]:
    """What is imported that is neither ours nor Python's."""
    modules = {"yaml": "pyyaml", "PIL": "pillow", "huggingface_hub": "huggingface-hub"}
    modules["prometheus_client"] = "prometheus-client"
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    names = {name.split(".")[0] for tree in trees for node in ast.walk(tree) for name in imported(node)}
    return {modules.get(name, name) for name in names - sys.stdlib_module_names - {"vllm_omni"}}


# of GPUs: the first comes with CUDA builds of torch, the second is an extra; the third is one too, of clusters
WHERE_INSTALLED = {"triton", "flash_attn", "ray"}
# torchsde: by diffusers, for a sampler of Stable Audio; tokenizers: by transformers, and its backend is used directly;
# the next two by fastapi and uvicorn; opentelemetry is a namespace of several
IMPORTED_BY_OTHERS = {
    *("torchsde", "tokenizers", "python-multipart", "websockets"),
    *("opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http"),
}


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module else []


# make, CI, hooks


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", read("Makefile"), flags=re.MULTILINE))


def test_the_makefile_has_its_targets_and_none_is_taken_for_a_file() -> None:
    (phony,) = re.findall(r"^\.PHONY: (.*)$", read("Makefile"), flags=re.MULTILINE)
    tests = {"test", "test-plain", "test-newest", "test-oldest"}
    expected = {"setup", "wheel", "demo", "fuzz", "deaths", "pins", "lint", "bench", *tests}
    assert targets() == expected == set(phony.split())
    assert "constraints.txt" in read("Makefile") and "constraints-oldest.txt" in read("Makefile")


def test_ci_runs_make_targets_that_exist_with_actions_of_a_major_version() -> None:
    jobs = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]
    assert jobs.keys() == {"lint", "test"}
    called = set()
    for job in jobs.values():
        matrix = job.get("strategy", {}).get("matrix", {})
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"])
                continue
            (target,) = re.fullmatch(r"make (.*)", step["run"]).groups()
            own = [*matrix.get("target", []), *(row["target"] for row in matrix.get("include", ()))]
            called |= set(own) if "matrix.target" in target else {target}
    assert called == {"lint", "test", "test-plain", "test-newest", "test-oldest"} <= targets()


def test_ci_covers_the_oldest_python_and_two_systems() -> None:
    matrix = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]["test"]["strategy"]["matrix"]
    assert PROJECT["project"]["requires-python"] == f">={matrix['python'][0]}"
    assert {system.split("-")[0] for system in matrix["os"]} == {"ubuntu", "macos"}
    assert "secrets" not in read(".github/workflows/ci.yml").split("jobs:")[1]


def test_hooks_run_the_tools_of_the_environment() -> None:
    (repository,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert repository["repo"] == "local"
    commands = [hook["entry"].split()[0] for hook in repository["hooks"]]
    assert commands == [".venv/bin/ruff", ".venv/bin/ruff", ".venv/bin/mypy"]
    assert {hook["language"] for hook in repository["hooks"]} == {"system"}
    assert {command.removeprefix(".venv/bin/") for command in commands} <= TOOLS.keys()


# Pages


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", read("CONTRIBUTING.md"), flags=re.MULTILINE | re.DOTALL)


def test_the_page_for_contributors_shows_code_of_every_kind_of_extension() -> None:
    bases = {base for block in blocks() for base in re.findall(r"^class \w+\((\w+)\)", block, flags=re.MULTILINE)}
    engine = {"StageSpec", "StageEngine", "StepCachePolicy", "RowCache", "PagedAttention"}
    assert bases == engine | {"CausalLM", "CausalLMConfig", "DiffusionModelSpec", "DiffusionModel"}


@pytest.mark.parametrize("block", blocks(), ids=lambda block: re.search(r"class (\w+)", block)[1])
def test_code_for_contributors_runs_and_keeps_its_contracts(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("contributing")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(block, "CONTRIBUTING.md", "exec"), module.__dict__)
    for node in ast.parse(block).body:
        if isinstance(node, ast.ClassDef) and node.bases:
            made = getattr(module, node.name)
            methods = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
            assert methods - FOUND_BY_NAME <= set(dir(made.__base__)), node.name
            left_out = getattr(made, "__abstractmethods__", frozenset())
            (beside,) = re.findall(rf"^class {node.name}\(.*\):(.*)$", block, flags=re.MULTILINE)
            assert left_out == set(re.findall(r"\w+", beside.replace("also", ""))), node.name


ROWS = {"stage kind": "Invert", "step cache": "EveryOther", "attention": "LoopAttention"}
GRAPH = {
    "name": "shown",
    "model": "asset://tiny-image",
    "stages": {
        "text": {
            "kind": "ar",
            "model": "${model}/text_encoder",
            "tokenizer": "${model}/tokenizer",
            "task": "encode",
            "outputs": {"hidden_states": {"layers": [-2]}},
        },
        "image": {"kind": "dit", "model": "${model}", "inputs": {"prompt_embeds": "text.hidden_states"}},
        "negative": {"kind": "Invert", "inputs": {"image": "image.image"}},
    },
    "outputs": ["image", "negative"],
}


def test_what_contributors_are_shown_works_in_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("contributing")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in blocks():
        exec(compile(block, "CONTRIBUTING.md", "exec"), module.__dict__)
    for table, name in ROWS.items():
        attribute = "InvertSpec" if name == "Invert" else name
        monkeypatch.setitem(registry.TABLES, table, {**registry.TABLES[table], name: f"contributing:{attribute}"})
    params = {"image": DiffusionParams(seed=3, num_inference_steps=6, guidance_scale=0.0)}
    shown = [[], ["text.attention=LoopAttention"], ["image.cache={policy: EveryOther, warmup_steps: 2}"]]
    found = []
    for overrides in shown:
        with Omni(GRAPH, overrides=overrides, device="cpu", dtype="float32", progress=False) as omni:
            (output,) = omni.generate("a red circle", params)
        assert output.error is None
        picture, negative = (np.asarray(image).astype(int) for image in output.images)
        assert (picture + negative == 255).all()
        found.append((picture, output.metrics["image"]["cache_hits"]))
    assert abs(found[1][0] - found[0][0]).max() <= 1  # another backend, the same picture
    assert [hits for _, hits in found] == [0, 0, 2]  # steps 3 and 5 of 0 .. 5


FOUND_BY_NAME = {"from_json", "read_config"}  # of the class that a config.json's architecture names


@by_page
def test_links_and_paths_of_a_page_lead_to_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert (page.parent / target).exists(), target
    named = re.findall(r"(?<![\w/.])((?:vllm_omni|tests|tools|configs|examples|docs|benchmarks)/[\w/.-]+)", text)
    for path in named:
        assert (ROOT / path.rstrip(".")).exists(), path


def members() -> dict[str, set[str]]:
    """Class -> names of its methods and fields, inherited ones included."""
    classes: dict[str, ast.ClassDef] = {}
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        classes |= {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}

    def of(name: str) -> set[str]:
        if name not in classes:
            return set()
        node = classes[name]
        own = {item.name for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)}
        own |= {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}  # type: ignore[union-attr]
        return own.union(*(of(base.id) for base in node.bases if isinstance(base, ast.Name)))

    return {name: of(name) for name in classes}


@by_page
def test_classes_and_methods_that_a_page_names_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    known = members()
    named = re.findall(r"`([A-Z]\w+)(?:\.([a-z_]\w*))?`", text)
    assert len(named) > 3
    for name, member in named:
        if name not in ALSO:
            assert name in known and (not member or member in known[name]), f"{name}.{member}"


ALSO = {"LlamaForCausalLM", "Qwen2ForCausalLM", "MASKED_REACHES"}  # architectures, a constant


def test_the_diagrams_of_the_architecture_name_classes_and_folders_that_exist() -> None:
    text = read("docs/architecture.md")
    diagrams = " ".join(re.findall(r"^```text\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL))
    known = members()
    for name in re.findall(r"\b(?:[A-Z][a-z]+){2,}\b", diagrams):
        assert name in known, name
    for folder in ("entrypoints", "executor", "engine", "models", "worker", "core", "layers", "media", "config"):
        assert re.search(rf"\b{folder}\b", diagrams) and (PACKAGE / folder).is_dir()


def test_every_decision_asks_tries_measures_and_chooses() -> None:
    entries = re.split(r"^### ", read("docs/decisions.md"), flags=re.MULTILINE)[1:]
    assert len(entries) > 10
    for entry in entries:
        assert re.findall(r"^- (\w+):", entry, flags=re.MULTILINE) == ["Asked", "Tried", "Figure", "Chosen"], entry[:40]


def test_the_changelog_has_a_section_for_what_comes_and_one_for_this_version() -> None:
    headings = re.findall(r"^## \[(.*)\]$", read("CHANGELOG.md"), flags=re.MULTILINE)
    assert headings[0] == "Unreleased" and PROJECT["project"]["version"] in headings


def test_the_writer_of_pins_leaves_out_torch_and_its_cuda_builds() -> None:
    left_out = import_module("tools.pins").LEFT_OUT
    assert all(left_out.match(name) for name in ("torch", "triton", "nvidia-cublas", "cuda-toolkit", "vllm-omni"))
    assert not any(left_out.match(name) for name in ("torchsde", "tritonclient", "pip-tools", "numpy"))
