"""The command line: quick help, `check` with graph and plan, errors of one line, pictures in files."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image
from support.music import save_folder
from support.toy_stage import TOY_YAML, register_toys

from vllm_omni import Audio
from vllm_omni.config import EdgeConfig, OmniConfig, StageConfig
from vllm_omni.config.graph import StageGraph
from vllm_omni.config.loader import load_config
from vllm_omni.entrypoints.cli import main
from vllm_omni.entrypoints.cli.generate import prompt_inputs, prompt_texts, stage_params
from vllm_omni.entrypoints.cli.graph_report import draw_graph
from vllm_omni.entrypoints.cli.output_files import OutputFiles
from vllm_omni.errors import ConfigError, InvalidRequestError, StageError
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.payload import StageSignature, TensorSpec
from vllm_omni.request import Completion, OmniOutput, RequestStatus, StageResult

register_toys()

NO_FLAGS = dict.fromkeys(
    [
        "seed",
        "steps",
        "height",
        "width",
        "guidance",
        "num_frames",
        "fps",
        "max_tokens",
        "temperature",
        "n",
        "lora",
        "guidance_interval",
    ]
)
STATES = TensorSpec(("T", 8))
RELAY = StageSignature(inputs=dict.fromkeys("abcd", STATES), outputs={"out": STATES}, results=frozenset({"out"}))


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture
def toy_file(tmp_path: Path) -> str:
    path = tmp_path / "toy.yaml"
    path.write_text(TOY_YAML)
    return str(path)


@pytest.mark.parametrize(
    "statement", ["import vllm_omni", "import vllm_omni.entrypoints.cli", "import vllm_omni.__main__"]
)
def test_importing_the_package_or_its_command_line_does_not_import_torch(statement: str) -> None:
    heavy = "{'torch', 'transformers', 'diffusers', 'omegaconf', 'numpy'}"
    done = python("-c", f"import sys; {statement}; print(sorted({heavy} & set(sys.modules)))")
    assert (done.stdout, done.returncode) == ("[]\n", 0)


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["check", "--help"], ["models"]])
def test_help_and_the_list_of_models_do_not_import_torch(arguments: list[str]) -> None:
    script = (
        "import sys\nfrom vllm_omni.entrypoints.cli import main\n"
        f"try: code = main({arguments!r})\nexcept SystemExit as stop: code = stop.code\n"
        "sys.exit(9 if 'torch' in sys.modules else code)"
    )
    done = python("-c", script)
    assert done.returncode == 0 and done.stdout


def test_a_language_model_is_loaded_without_what_compiles_and_draws() -> None:
    heavy = "{'torch._dynamo', 'sympy', 'diffusers', 'scipy', 'transformers.modeling_utils'}"
    script = (
        "import sys; from vllm_omni import Omni\n"
        f"with Omni(config='tiny_talker'): print(sorted({heavy} & set(sys.modules)))"
    )
    done = python("-c", script)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_help_shows_every_command_and_examples() -> None:
    done = python("-m", "vllm_omni", "--help")
    assert done.returncode == 0
    for word in ("generate", "check", "models", "examples:", "vllm-omni check tiny_omni"):
        assert word in done.stdout


def test_models_lists_configs_kinds_and_checkpoints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    shown = capsys.readouterr().out
    for word in (
        "tiny_scene",
        "z_image",
        "Qwen3ForCausalLM",
        "ZImagePipeline",
        "ar, diffusers, dit",
        "music_prompt",
        "first_block",
        "Models that ship",
    ):
        assert word in shown


def test_check_shows_graph_ports_and_memory(toy_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", toy_file, "--set", "resources.max_memory_gb=2"]) == 0
    shown = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in shown.split("\n")]
    for line in (
        "● source · echo => source.states",
        "● loud · upper => loud",
        "source out states [T, 4] -> loud.states, => tensor",
        "loud in text text <- source.text",
        "loud out text text => result",
        "source 3.0 MiB 1.0 MiB 0.5 MiB - - 4.5 MiB",
        "prompt embeddings 64.0 MiB",
        "all 73.0 MiB",
    ):
        assert line in lines
    assert "budget 2.00 GiB" in shown


def test_check_says_which_ports_nobody_connects_or_reads(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(TOY_YAML.replace(", states: source.states", "").replace(", source.states", ""))
    assert main(["check", str(path)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.split("\n")]
    assert "loud in states [T, 4] not connected" in lines and "source out states [T, 4] not computed" in lines


def test_check_says_what_is_not_loaded_and_plans_without_it(toy_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", toy_file, "--set", "outputs=[source]"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.split("\n")]
    assert "not loaded, since no output calls for them: loud" in lines
    assert "source out states [T, 4] not computed" in lines and "all 68.5 MiB" in lines
    assert not any(line.startswith("loud") for line in lines)


def test_flags_leave_out_the_stages_that_are_not_loaded(toy_file: str) -> None:
    config = load_config(toy_file, ["outputs=[source]"])
    assert list(stage_params(Pipeline(config), {**NO_FLAGS, "seed": 3})) == ["source"]


def test_a_plan_beyond_the_budget_is_shown_and_fails(toy_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", toy_file, "--set", "resources.max_memory_gb=0.01"]) == 1
    captured = capsys.readouterr()
    assert "all" in captured.out
    assert captured.err.startswith("error: ") and "resources.max_memory_gb" in captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "tiny_omny"], ["'tiny_omny'", "did you mean 'tiny_omni'"]),
        (["check", "FILE", "--set", "sorce.width=1"], ["did you mean 'source'"]),
        (
            ["check", "FILE", "--set", "source.width=5"],
            ["source.states gives a tensor [T, 5], expected a tensor [T, 4]"],
        ),
        (["check", "FILE", "--model", "a/b"], ["model: got 'a/b', which no stage uses"]),
    ],
)
def test_an_error_is_one_line_and_exit_code_1(
    arguments: list[str], words: list[str], toy_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([toy_file if item == "FILE" else item for item in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and not captured.out
    for word in words:
        assert word in captured.err


def test_the_module_runs_as_a_program_and_returns_the_exit_code() -> None:
    done = python("-m", "vllm_omni", "check", "no_such_config")
    assert done.returncode == 1 and done.stderr.startswith("error: config: got 'no_such_config'")
    assert python("-m", "vllm_omni").returncode == 2
    assert python("-m", "vllm_omni", "generate").returncode == 2


@pytest.mark.parametrize("arguments", [["models"], ["check", "no_such_config"], ["generate"]])
def test_a_command_that_ends_keeps_the_interpreter_from_looking_through_what_is_there(arguments: list[str]) -> None:
    script = (
        f"import gc, sys\nfrom vllm_omni.__main__ import run\nsys.argv[1:] = {arguments!r}\n"
        "try: run()\nfinally: print(gc.get_freeze_count() > 1000, file=sys.stderr)"
    )
    assert python("-c", script).stderr.endswith("True\n")


def test_a_reader_that_stops_early_leaves_no_traceback() -> None:
    command = f"{sys.executable} -m vllm_omni models | head -c 10"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False, timeout=60)
    assert len(done.stdout) == 10 and done.stderr == ""


def drawing(inputs: dict[str, list[str]], outputs: list[str]) -> list[str]:
    """The rails alone, of stages that read the named others."""
    stages = {
        name: StageConfig(name=name, kind="x", inputs={p: f"{s}.out" for p, s in zip("abcd", sources, strict=False)})
        for name, sources in inputs.items()
    }
    graph = StageGraph(stages, dict.fromkeys(stages, RELAY), outputs)
    return [
        line.split(" · ")[0].rstrip() for line in draw_graph(OmniConfig(stages=stages, outputs=tuple(outputs)), graph)
    ]


def test_the_drawing_of_a_fan_in() -> None:
    assert drawing({"text": [], "negative": [], "image": ["text", "negative"]}, ["image"]) == [
        "  ●    text",
        "  │ ●  negative",
        "  ├─╯",
        "  ●    image",
    ]


def test_the_drawing_of_a_fan_out() -> None:
    assert drawing({"text": [], "one": ["text"], "two": ["text"], "three": ["text"]}, ["one", "two", "three"]) == [
        "  ●      text",
        "  ├─┬─╮",
        "  ● │ │  one",
        "    ● │  two",
        "      ●  three",
    ]


def test_the_drawing_of_edges_that_cross() -> None:
    inputs = {"s": [], "t": [], "left": ["s", "t"], "right": ["s", "t"], "end": ["left", "right"]}
    assert drawing(inputs, ["end"]) == [
        "  ●        s",
        "  ├─╮",
        "  │ │ ●    t",
        "  │ │ ├─╮",
        "  ├─┼─╯ │",
        "  ● │   │  left",
        "  │ ├───╯",
        "  │ ●      right",
        "  ├─╯",
        "  ●        end",
    ]


def test_a_condition_stands_on_the_edge_above_the_stage_that_it_keeps_waiting() -> None:
    edges = {
        "thinker": {},
        "image": {"a": EdgeConfig("thinker.out", "scene"), "b": "thinker.out"},
        "sound": {"a": EdgeConfig("thinker.out", "sound and n > 2"), "b": EdgeConfig("image.out", "n")},
    }
    stages = {name: StageConfig(name=name, kind="x", inputs=inputs) for name, inputs in edges.items()}
    graph = StageGraph(stages, dict.fromkeys(stages, RELAY), ["sound"])
    assert draw_graph(OmniConfig(stages=stages, outputs=("sound",)), graph) == [
        "  ●    thinker · x",
        "  ├─╮",
        "  │ │  thinker.out -> a  when scene",
        "  ● │  image · x",
        "  ├─╯",
        "  │    thinker.out -> a  when sound and n > 2",
        "  │    image.out -> b  when n",
        "  ●    sound · x  => sound",
    ]


def test_check_shows_the_condition_at_both_ports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text(TOY_YAML)
    assert main(["check", str(path), "--set", "loud.inputs.text.when='sound' in text"]) == 1
    assert main(["check", str(path), "--set", "loud.inputs.text.when=\"'sound' in text\""]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.split("\n")]
    assert "│ source.text -> text when 'sound' in text" in lines
    assert "loud in text text <- source.text when 'sound' in text" in lines
    assert "source out text text -> loud.text when 'sound' in text" in lines


def test_every_stage_stands_once_in_the_drawing_and_no_rail_is_left_over() -> None:
    inputs = {"a": [], "b": ["a"], "c": ["a", "b"], "d": ["a", "c"], "e": ["b", "d", "a"], "f": []}
    lines = drawing(inputs, ["e", "f"])
    assert [line.split()[-1] for line in lines if "●" in line] == ["a", "b", "c", "d", "e", "f"]
    assert lines[-1].split() == ["●", "f"]


def test_flags_become_params_of_the_stages_that_take_them(toy_file: str) -> None:
    params = stage_params(Pipeline(load_config(toy_file)), {**NO_FLAGS, "seed": 7})
    assert set(params) == {"source", "loud"}
    assert all(stage.seed == 7 and stage.repeat is None for stage in params.values())
    assert stage_params(Pipeline(load_config(toy_file)), NO_FLAGS) == {}


def test_a_flag_that_no_stage_takes_is_an_error(toy_file: str) -> None:
    with pytest.raises(InvalidRequestError, match="--max-tokens: no stage of 'toy' takes 'max_tokens'"):
        stage_params(Pipeline(load_config(toy_file)), {**NO_FLAGS, "max_tokens": 3})


def output(
    num_images: int = 0, text: str | None = None, error: StageError | None = None, num_sounds: int = 0
) -> OmniOutput:
    sounds = tuple(Audio(np.full((1, 800), index / 4, np.float32), 8000) for index in range(num_sounds))
    images = tuple(Image.new("RGB", (4, 4), (index, 0, 0)) for index in range(num_images))
    completions = () if text is None else (Completion(text=text, token_ids=(), finish_reason="stop"),)
    results = {"stage": StageResult(completions=completions, images=images, audios=sounds)}
    status = RequestStatus.FAILED if error else RequestStatus.FINISHED
    return OmniOutput(request_id="r", status=status, results=results, error=error)


def names(paths: list[Path], folder: Path) -> list[str]:
    assert all(path.is_file() for path in paths)
    return [str(path.relative_to(folder)) for path in paths]


def test_one_picture_takes_the_name_and_several_are_numbered(tmp_path: Path) -> None:
    files = OutputFiles(str(tmp_path / "new" / "out.png"))
    assert names(files.write([output(1, "words")]), tmp_path) == ["new/out.png"]
    assert names(files.write([output(1), output(2)]), tmp_path) == [
        "new/out-0.png",
        "new/out-1-0.png",
        "new/out-1-1.png",
    ]
    assert Image.open(tmp_path / "new" / "out-1-1.png").getpixel((0, 0)) == (1, 0, 0)


def test_a_folder_takes_pictures_and_text(tmp_path: Path) -> None:
    files = OutputFiles(str(tmp_path / "folder"))
    assert names(files.write([output(1, "red"), output(2), output(0, "blue")]), tmp_path / "folder") == [
        "0.png",
        "0.txt",
        "1-0.png",
        "1-1.png",
        "2.txt",
    ]
    assert (tmp_path / "folder" / "0.txt").read_text() == "red\n"


def test_sounds_take_the_name_or_that_of_the_pictures_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    melody = OutputFiles(str(tmp_path / "melody.flac"))
    assert names(melody.write([output(num_sounds=1)]), tmp_path) == ["melody.flac"]
    assert names(melody.write([output(num_sounds=1), output(num_sounds=2)]), tmp_path) == [
        "melody-0.flac",
        "melody-1-0.flac",
        "melody-1-1.flac",
    ]
    assert soundfile.read(tmp_path / "melody-1-1.flac")[0][0] == 0.25
    assert names(melody.write([output(1, num_sounds=1)]), tmp_path) == ["melody.png", "melody.flac"]
    assert names(OutputFiles(str(tmp_path / "a.b.jpg")).write([output(1, num_sounds=1)]), tmp_path) == [
        "a.b.jpg",
        "a.b.wav",
    ]
    monkeypatch.chdir(tmp_path)
    assert [str(path) for path in OutputFiles(None).write([output(1, num_sounds=2)])] == [
        "out.png",
        "out-0.wav",
        "out-1.wav",
    ]


def test_a_folder_takes_sounds_beside_pictures_and_text(tmp_path: Path) -> None:
    files = OutputFiles(f"{tmp_path}/answers/")
    found = files.write([output(1, "red", num_sounds=1), output(0, num_sounds=2)])
    assert names(found, tmp_path / "answers") == ["0.png", "0.wav", "0.txt", "1-0.wav", "1-1.wav"]


def test_inputs_are_numbers_and_words() -> None:
    given = [
        "bpm=90",
        "duration_s=2.5",
        "lyrics=[verse] a=b",
        'audio="9"',
        'text="two\\nlines"',
        "x=NaN",
        "y=true",
        "z=",
    ]
    assert prompt_inputs(given, {"negative_prompt": "blurry"}) == {
        "negative_prompt": "blurry",
        "bpm": 90,
        "duration_s": 2.5,
        "lyrics": "[verse] a=b",
        "audio": "9",
        "text": "two\nlines",
        "x": "NaN",
        "y": "true",
        "z": "",
    }


@pytest.mark.parametrize("given", [["bpm"], ["=3"], ["bpm=3", "bpm=4"], ["prompt=x"], ["negative_prompt=x"]])
def test_an_input_is_said_once_and_has_a_value(given: list[str]) -> None:
    with pytest.raises(InvalidRequestError, match="--input"):
        prompt_inputs(given, {"negative_prompt": "blurry"})


def test_inputs_reach_the_stages_and_a_wrong_key_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_folder(tmp_path / "model")
    path = tmp_path / "music.yaml"
    path.write_text(
        f"stages:\n  prompt: {{kind: music_prompt, model: {folder}}}\n"
        "  reader: {kind: upper, inputs: {text: prompt.caption}}\noutputs: [reader]\n"
    )
    arguments = ["generate", "calm piano", "--config", str(path), "--input", "bpm=90"]
    assert main([*arguments, "--input", "keyscale=F# minor", "--input", "duration_s=7.9"]) == 0
    shown = capsys.readouterr().out
    assert "# CAPTION\nCALM PIANO" in shown and "- BPM: 90\n" in shown and "- DURATION: 7 SECONDS" in shown
    assert main([*arguments, "--input", "lirycs=la"]) == 1
    assert "prompt['lirycs']: unknown key (did you mean 'lyrics'?)" in capsys.readouterr().err


def test_tensors_go_to_safetensors_in_a_folder(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    states = torch.arange(12.0).reshape(3, 4).T
    result = OmniOutput(request_id="r", status=RequestStatus.FINISHED, tensors={"text.states": states})
    (path,) = OutputFiles(f"{tmp_path}/").write([result])
    assert torch.equal(load_file(path)["text.states"], states)


def test_an_output_name_that_cannot_hold_the_answer_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"-o: got 'x\.bmp', expected a folder or a file"):
        OutputFiles("x.bmp")
    for kind, name in (("an image", "x.png"), ("audio", "x.wav")):
        with pytest.raises(ConfigError, match=f"{name}', but no answer holds {kind}; give a folder for all kinds"):
            OutputFiles(str(tmp_path / name)).write([output(0, "words")])
    assert OutputFiles(str(tmp_path / "x.png")).write([output(error=StageError("no memory"))]) == []
    monkeypatch.chdir(tmp_path)
    assert OutputFiles(None).write([output(0, "words")]) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        OutputFiles(str(tmp_path / "file" / "x.png")).write([output(1)])


def test_generate_prints_text_writes_files_and_reports_metrics(
    toy_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "red ball", "blue box", "--config", toy_file, "-o", str(tmp_path / "out"), "--metrics"]
    assert main([*arguments, "--set", "source.defaults.repeat=2"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "RED BALL RED BALL\nBLUE BOX BLUE BOX\n"
    assert "prompt 1  loud" in captured.err and "wrote " in captured.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "0.safetensors",
        "0.txt",
        "1.safetensors",
        "1.txt",
    ]


def test_generate_fails_before_any_work_when_a_flag_or_a_name_is_wrong(
    toy_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "red", "--config", toy_file, "-o", "x.gif"]) == 1
    assert main(["generate", "red", "--config", toy_file, "--steps", "3"]) == 1
    assert capsys.readouterr().err.count("error: ") == 2


def test_what_the_terminal_cannot_show_is_replaced() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "vllm_omni", "check", "no-such-config-\u00e9\u732b"],
        env={**os.environ, "PYTHONIOENCODING": "ascii:strict"},
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert run.returncode == 1 and b"Traceback" not in run.stderr and b"no-such-config-??" in run.stderr


def test_text_goes_into_one_file_as_it_is_or_as_json(tmp_path: Path) -> None:
    outputs = [output(0, "red"), output(1, "caf\u00e9"), output(error=StageError("no memory"))]
    prompts = ["a", "b", "c"]
    assert names(OutputFiles(f"{tmp_path}/a.txt").write(outputs, prompts), tmp_path) == ["a.txt", "a-1.png"]
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "red\ncaf\u00e9\n"
    OutputFiles(f"{tmp_path}/b.json").write(outputs, prompts)
    OutputFiles(f"{tmp_path}/c.jsonl").write(outputs, prompts)
    whole = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))
    assert whole == [json.loads(line) for line in (tmp_path / "c.jsonl").read_text(encoding="utf-8").splitlines()]
    assert whole[1] == {
        "prompt": "b",
        "completions": [{"text": "caf\u00e9", "finish_reason": "stop"}],
        "status": "finished",
        "error": None,
    }
    assert whole[2]["error"] == "no memory" and whole[2]["completions"] == []
    with pytest.raises(ConfigError, match="no answer holds text"):
        OutputFiles(f"{tmp_path}/d.txt").write([output(1)])


def test_prompts_come_from_the_command_line_stdin_and_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n  \ntwo words\n", encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO("from\nstdin\n"))
    assert prompt_texts(["a", "-"], str(file)) == ["a", "from\nstdin", "one", "two words"]
    file.write_text("\n")
    for name, words in ((str(file), "which holds no prompt"), (str(tmp_path / "no.txt"), "expected a text file")):
        with pytest.raises(InvalidRequestError, match=f"--prompts: got .*{words}"):
            prompt_texts([], name)


def test_a_file_of_prompts_gives_a_file_of_answers(tmp_path: Path) -> None:
    file, answers = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    file.write_text("please paint a crimson ball\ncould you draw me a golden hoop\n", encoding="utf-8")
    assert (
        main(["generate", "--config", "tiny_scene", "--prompts", str(file), "-o", str(answers), "-q", "--steps", "1"])
        == 0
    )
    found = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    assert [answer["completions"][0]["text"] for answer in found] == ["a red circle", "a yellow ring"]


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="this system has no pseudo-terminals")
def test_text_shows_on_a_terminal_as_it_is_written() -> None:
    terminal, end = os.openpty()
    prompt = "please paint a crimson ball left of a navy box"
    command = ["generate", prompt, "--config", "tiny_scene", "--set", "outputs=[writer]"]
    # `nice`: the reader goes first, since on a busy machine what it reads late comes at once
    with subprocess.Popen(["nice", sys.executable, "-m", "vllm_omni", *command], stdout=end) as run:
        os.close(end)
        pieces: list[bytes] = []
        with contextlib.suppress(OSError):  # which says that the other end is closed
            while piece := os.read(terminal, 1024):
                pieces.append(piece)
    os.close(terminal)
    assert run.returncode == 0 and b"".join(pieces) == b"a red circle left of a blue square\r\n"
    assert len(pieces) > 1, "it came all at once"


@pytest.mark.parametrize("name", ["file/x.png", "file/", "x" * 300 + ".png"])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("vllm_omni.entrypoints.omni.Omni.__init__", lambda *_, **__: pytest.fail("work began"))
    assert main(["generate", "a red circle", "-o", f"{tmp_path}/{name}"]) == 1
    assert re.search("cannot be (written|opened)", capsys.readouterr().err)
