"""Stage kinds from outside: modules that a config names, and entry points of installed packages."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from vllm_omni import Omni, registry
from vllm_omni.config import plugins
from vllm_omni.config.loader import load_config
from vllm_omni.entrypoints.cli import main
from vllm_omni.errors import ConfigError

MODULE = """
import dataclasses
from vllm_omni import registry
from support.toy_engine import TextSpecimen
registry.register("stage kind", "{kind}", "{name}:Spec")
class Spec(TextSpecimen):
    pass
"""


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """What a test adds to the process goes with it."""
    kinds, path, modules = dict(registry.TABLES["stage kind"]), list(sys.path), set(sys.modules)
    yield
    registry.TABLES["stage kind"].clear()
    registry.TABLES["stage kind"].update(kinds)
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith("their_"):
            del sys.modules[name]
    plugins.load_entry_points.cache_clear()


def write(folder: Path, name: str, kind: str = "theirs") -> None:
    (folder / f"{name}.py").write_text(MODULE.format(kind=kind, name=name))


def config(folder: Path, imports: object, kind: str = "theirs") -> Path:
    path = folder / "config.yaml"
    content = {"import": imports, "stages": {"words": {"kind": kind}}, "outputs": ["words"]}
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("form", ["name", "list"])
def test_a_module_beside_the_config_adds_a_stage_kind(form: str, tmp_path: Path) -> None:
    write(tmp_path, "their_stages")
    with Omni(config(tmp_path, "their_stages" if form == "name" else ["their_stages"]), progress=False) as omni:
        (output,) = omni.generate("ab")
    assert output.error is None and output.text == "abab"


def test_an_installed_module_is_found_by_a_mapping_and_an_override(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "their_installed")
    monkeypatch.syspath_prepend(tmp_path)
    stages = {"words": {"kind": "theirs"}}
    assert load_config({"import": "their_installed", "stages": stages, "outputs": ["words"]}).stages["words"]
    path = tmp_path / "plain.yaml"
    path.write_text(yaml.safe_dump({"stages": stages, "outputs": ["words"]}))
    assert load_config(path, ["import=their_installed"]).stages["words"].kind == "theirs"


def test_the_command_line_knows_it_too(tmp_path: Path) -> None:
    write(tmp_path, "their_cli")
    path = config(tmp_path, "their_cli")
    assert main(["check", str(path)]) == 0


@pytest.mark.parametrize(
    ("imports", "words"),
    [
        ("their_missing", "cannot be imported.*ModuleNotFoundError.*put it beside the config"),
        ("../evil", "expected the name of a module"),
        ("", "expected the name of a module"),
        ("a b", "expected the name of a module"),
        (["their_missing", 3], "expected a string"),
        ({"a": 1}, "expected a string or a list"),
        ("their_broken", r"their_broken', which cannot be imported \(ZeroDivisionError"),
        ("their_taken", "their_taken: stage kind 'ar': already registered"),
    ],
)
def test_what_cannot_be_imported_is_said_with_the_key(imports: object, words: str, tmp_path: Path) -> None:
    (tmp_path / "their_broken.py").write_text("1 / 0")
    write(tmp_path, "their_taken", kind="ar")
    with pytest.raises(ConfigError, match=f"import.*{words}"):
        load_config(config(tmp_path, imports))


def test_the_folder_of_a_config_hides_no_module(tmp_path: Path) -> None:
    write(tmp_path, "their_first")
    (tmp_path / "json.py").write_text("raise RuntimeError('the wrong json')")
    load_config(config(tmp_path, "their_first"))
    assert sys.path[-1] == str(tmp_path)


def test_an_installed_package_announces_its_kinds(tmp_path: Path) -> None:
    """In a process of its own, with the metadata as an installer writes it."""
    write(tmp_path, "their_package", kind="announced")
    (tmp_path / "their_bad.py").write_text("1 / 0")
    folder = tmp_path / "their_package-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[vllm_omni]\nstages = their_package\nbad = their_bad\n")
    tests = Path(__file__).parents[1]
    script = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(tests)!r}]\n"
        "from vllm_omni.entrypoints.cli import main; sys.exit(main(['models']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0 and "announced" in done.stdout, done.stderr
    assert "bad = their_bad: left out (ZeroDivisionError" in done.stderr
