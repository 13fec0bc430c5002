"""What a newcomer sees while it works: what is loaded and from where, the steps of one request, the log."""

from __future__ import annotations

import io
import logging
import sys
import types
from pathlib import Path

import pytest
from support.diffusers_folders import random_stable_audio
from support.loop import executor
from support.programs import run_program
from support.toy_engine import PictureParams, TextParams, text_config, toy_config

from vllm_omni import Omni
from vllm_omni.entrypoints.progress import can_show_bars
from vllm_omni.executor.loading_step import LoadingStep


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What goes to a terminal, without delay."""
    stderr = Terminal()
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setattr("vllm_omni.entrypoints.progress.DELAY_S", 0.0)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("LINES", "50")
    return stderr


def test_loading_says_what_it_loads_from_where_and_in_which_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = on_terminal(monkeypatch)
    Omni("tiny_image", dtype="bfloat16").close()
    said = shown.getvalue()
    assert "loading tiny-image" in said
    assert "text: ar from asset://tiny-image/text_encoder (bfloat16 on cpu, " in said
    assert "image: dit from asset://tiny-image (bfloat16 on cpu, " in said and "MiB" in said


def test_weights_that_stages_share_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="vllm_omni"):
        Omni("tiny_image", progress=False).close()
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("loading ")]
    assert [line.split(":")[0] for line in lines] == ["loading text", "loading negative", "loading image"]
    assert ["MiB" in line for line in lines] == [True, False, True]


def test_a_pipeline_that_is_hosted_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    random_stable_audio(tmp_path)
    with caplog.at_level(logging.INFO, logger="vllm_omni"):
        Omni("diffusers", model=str(tmp_path), progress=False).close()
        assert "StableAudioPipeline of diffusers, hosted as it is (gives audio)" in caplog.text
        Omni(model=str(tmp_path), progress=False).close()
    assert f"{tmp_path}: runs with the shipped config stable_audio" in caplog.text


def test_a_stage_without_a_model_says_no_place() -> None:
    assert str(LoadingStep("a", "toy", None, "float32", "cpu", 0, "as configured")) == "a: toy (float32 on cpu)"


def test_one_request_shows_its_steps_and_several_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = on_terminal(monkeypatch)
    with Omni(text_config(name="toyland")) as omni:
        shown.truncate(0)
        omni.generate("a", TextParams(steps=50))
        assert "/50" in shown.getvalue() and "step" in shown.getvalue()
        shown.truncate(0)
        omni.generate(["a", "b", "c"], TextParams(steps=50))
        assert "/3" in shown.getvalue() and "request" in shown.getvalue()


def test_steps_of_several_stages_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = on_terminal(monkeypatch)
    with Omni(toy_config()) as omni:
        (output,) = omni.generate("a", {"encode": TextParams(steps=7), "picture": PictureParams(steps=11)})
    assert output.error is None and "picture 11/11" in shown.getvalue()


def test_bars_show_in_a_notebook_whose_stderr_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert not can_show_bars()
    shell = types.SimpleNamespace(config={})
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))  # type: ignore[arg-type]
    assert not can_show_bars(), "an IPython in a pipe is no notebook"
    shell.config = {"IPKernelApp": {}}
    assert can_show_bars()
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: None))  # type: ignore[arg-type]
    assert not can_show_bars()


def test_without_v_nothing_is_logged_and_with_it_what_is_loaded() -> None:
    for flags, is_said in (([], False), (["-v"], True)):
        command = ["-m", "vllm_omni", "generate", "a red circle", "-q", "--steps", "1", *flags]
        done = run_program(*command, "-o", "/dev/null/x.png")
        assert done.returncode == 1  # the place cannot be written: refused before the work
        assert "loading" not in done.stderr
        command = ["-m", "vllm_omni", "generate", "please paint a crimson ball", "-q", *flags]
        more = ["--config", "tiny_scene", "--set", "outputs=[writer]", "--max-tokens", "2"]
        done = run_program(*command, *more)
        assert done.returncode == 0 and ("INFO vllm_omni" in done.stderr) is is_said
        assert ("loading writer: ar from asset://tiny-image/text_encoder" in done.stderr) is is_said


def test_the_number_of_threads_is_set_once_when_stages_load(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", set_to.append)
    loop = executor(text_config(threads=3))
    loop.shutdown()
    executor(text_config()).shutdown()
    assert set_to == [3]


def test_threads_hold_in_the_threads_of_the_loop() -> None:
    script = (
        "import threading, torch\n"
        "from vllm_omni.entrypoints.loading import open_pipeline, load_executor\n"
        "load_executor(open_pipeline('tiny_scene', overrides=['resources.threads=1', 'outputs=[writer]'])).shutdown()\n"
        "found = []\n"
        "thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))\n"
        "thread.start(); thread.join()\n"
        "print(torch.get_num_threads(), found)"
    )
    done = run_program("-c", script)
    assert done.stdout == "1 [1]\n", done.stderr
