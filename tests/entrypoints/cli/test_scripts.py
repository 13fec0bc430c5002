"""What scripts and shells read: `--json`, completion, and the lists of `models`."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from support.programs import run_program

from vllm_omni.config.shipped import shipped_configs
from vllm_omni.entrypoints.cli import build_parser, main
from vllm_omni.entrypoints.cli.as_json import print_json
from vllm_omni.entrypoints.cli.completion import options_by_command
from vllm_omni.entrypoints.cli.models import first_sentence

WRITER = ["--config", "tiny_scene", "--set", "outputs=[writer]"]


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> object:
    assert main(list(arguments)) == 0
    return json.loads(capsys.readouterr().out)


def test_generate_prints_answers_and_files_as_one_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["please paint a crimson ball", "could you draw me a golden hoop"]
    found = said(
        capsys, "generate", *prompts, "--json", "-q", "--steps", "1", "--config", "tiny_scene", "-o", f"{tmp_path}/"
    )
    assert isinstance(found, dict) and [item["prompt"] for item in found["outputs"]] == prompts
    first = found["outputs"][0]
    assert first["completions"][0]["text"] == "a red circle" and first["status"] == "finished"
    assert first["num_images"] == 1 and first["metrics"]["image"]["steps"] == 1
    assert sorted(found["files"]) == sorted(map(str, tmp_path.iterdir()))


def test_an_error_stands_in_the_document_and_in_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "x" * 100_001, "--json", "-q", *WRITER]) == 1
    captured = capsys.readouterr()
    (answer,) = json.loads(captured.out)["outputs"]
    assert answer["status"] == "rejected" and "100000" in answer["error"] and captured.err


def test_check_and_models_print_documents(capsys: pytest.CaptureFixture[str]) -> None:
    checked = said(capsys, "check", "tiny_image", "--json")
    assert isinstance(checked, dict) and set(checked["stages"]) == {"text", "negative", "image"}
    memory = checked["stages"]["image"]["memory"]
    assert memory["weights_bytes"] > 10**6 and memory["total_bytes"] >= memory["weights_bytes"]
    assert checked["stages"]["image"]["inputs"]["prompt_embeds"] == "text.hidden_states"
    listed = said(capsys, "models", "--json")
    assert isinstance(listed, dict) and "tiny-image" in listed["models"]
    assert set(listed["configs"]) == set(shipped_configs()) and "ar" in listed["registered"]["stage kind"]


def test_numbers_that_json_lacks_are_null(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": float("nan"), "b": [float("inf"), Path("x")], 3: {"c": None}})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, "x"], "3": {"c": None}}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_names_every_command_and_option(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for command, options in options_by_command(build_parser()).items():
        assert command in script
        for option in options:
            assert (option if shell != "fish" else option.lstrip("-")) in script
    assert "tiny_scene" in script


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("ch", "check"),
        ("generate --ste", "--steps"),
        ("generate --config tiny_sc", "tiny_scene"),
        ("check tiny_sc", "tiny_scene"),
        ("generate nosuch", ""),
    ],
)
def test_bash_completes(words: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["completion", "bash"])
    given = ["vllm-omni", *words.split()]
    script = (
        f"{capsys.readouterr().out}\nCOMP_WORDS=({' '.join(given)}); COMP_CWORD={len(given) - 1}\n"
        '_vllm_omni; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=30)
    assert (done.stdout, done.stderr) == (f"{expected}\n", "")


def test_a_description_ends_where_its_sentence_does() -> None:
    for path in shipped_configs().values():
        words = first_sentence(path.read_text(encoding="utf-8"))
        assert words and words.endswith(".") and "#" not in words
    assert first_sentence("# One\n# two. Three.\nname: x") == "One two." and first_sentence("name: x") == ""


IMPOSSIBLE = ["x" * 300, "~nosuchuser/x", "a\0b"]


@pytest.mark.parametrize("name", IMPOSSIBLE, ids=["long", "user", "null"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "{}"],
        ["check", "--model", "{}"],
        ["check", "tiny_image", "--model", "{}"],
        ["check", "tiny_image", "--model", "asset://{}"],
        ["check", "tiny_image", "--set", "text.tokenizer={}"],
        ["generate", "x", "--config", "{}"],
        ["generate", "x", "-o", "{}.png"],
        ["generate", "--prompts", "{}"],
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_names_that_no_file_can_have_are_refused_in_one_line(
    name: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argument.replace("{}", name) for argument in arguments]) == 1
    complaint = capsys.readouterr().err
    assert complaint.startswith("error: ") and complaint.count("\n") == 1


TAGS = ["!!int", "!!float", "!!float x", "!!bool", "!!timestamp", "!!binary é", "!!python/name:os.system", "9" * 5000]


@pytest.mark.parametrize("value", TAGS, ids=lambda value: value[:12])
def test_a_value_that_does_not_fit_its_tag_is_refused(
    value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(shipped_configs()["tiny_image"].read_text() + f"\nlimits: {{max_pixels: {value}}}\n")
    assert main(["check", str(path)]) == 1
    complaint = capsys.readouterr().err
    assert complaint.startswith("error: ") and complaint.count("\n") == 1
    assert main(["check", "tiny_image", "--set", f"limits.max_pixels={value}"]) == 1


@pytest.mark.parametrize("key", ["resources.max_memory_gb", "dit_cache.max_memory_mb", "dit_cache.prompt_embeds_mb"])
@pytest.mark.parametrize("value", ["1e308", "1e300", "-1", ".inf", ".nan"])
def test_a_size_that_no_machine_has_is_refused(key: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "tiny_image", "--set", f"{key}={value}"]) == 1
    assert f"{key}: got " in capsys.readouterr().err


def test_the_second_snippet_of_the_readme_runs_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    snippets = [part.split("```")[0] for part in readme.split("```python\n")[1:]]
    (snippet,) = (text for text in snippets if "omni.stream(" in text)
    monkeypatch.chdir(tmp_path)
    done = run_program("-c", snippet)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("None (128, 128)\n")
