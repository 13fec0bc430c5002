"""`offload: weights` from the key to the plan: refused where it gains nothing, planned for, and said."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from support.ar import make_model_folder

from vllm_omni.config.loader import load_config
from vllm_omni.engine import base
from vllm_omni.entrypoints.cli import main
from vllm_omni.errors import ConfigError, ResourceError
from vllm_omni.executor import memory
from vllm_omni.executor.memory import plan_memory, reserve_memory
from vllm_omni.executor.pipeline import Pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("ar") / "model", num_hidden_layers=6)


def planned(folder: Path, offload: str, num_stages: int = 1) -> tuple[Pipeline, dict[str, Any]]:
    keys = {"kind": "ar", "model": str(folder), "offload": offload, "kv_memory_mb": 1}
    stages = {f"text{number}": keys for number in range(num_stages)}
    given = {"stages": stages, "outputs": list(stages), "device": "cpu", "dtype": "float32"}
    pipeline = Pipeline(load_config(given))
    return pipeline, dict(plan_memory(pipeline))


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "is_cuda", lambda device: True)


def test_it_is_refused_where_it_gains_nothing(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"stages\.text0\.offload: got 'weights' on cpu, expected none: .* remove"):
        planned(folder, "weights")
    with pytest.raises(ConfigError, match=r"stages\.text0\.offload: got 'wieghts'"):
        planned(folder, "wieghts")


def test_a_stage_without_blocks_refuses_it(as_on_a_gpu: None) -> None:
    with pytest.raises(ConfigError, match=r"stages\.token2wav\.offload: got 'weights', expected none: this stage"):
        Pipeline(load_config("tiny_speech", overrides=["token2wav.offload=weights"]))


def test_the_plan_counts_what_stays_and_two_stages_share_what_waits(folder: Path, as_on_a_gpu: None) -> None:
    _, kept = planned(folder, "none")
    pipeline, streamed = planned(folder, "weights", num_stages=2)
    whole, plan = kept["text0"], streamed["text0"]
    slots = 2 * plan.offloaded_bytes // 6
    assert plan.weights_bytes == whole.weights_bytes - plan.offloaded_bytes + slots
    assert plan.offloaded_bytes > 0.7 * whole.weights_bytes
    assert plan.total_bytes < whole.total_bytes
    assert streamed["text1"].weights_bytes == streamed["text1"].offloaded_bytes == 0
    assert not pipeline.specs["text0"].note().endswith("CUDA graphs")


def test_the_host_must_have_room_for_what_waits(
    folder: Path, as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, plans = planned(folder, "weights")
    reserve_memory(pipeline.config, plans)
    monkeypatch.setattr(memory, "free_memory_bytes", lambda device: plans["text0"].offloaded_bytes - 1)
    with pytest.raises(ResourceError, match=r"free memory of the host.*text0"):
        reserve_memory(pipeline.config, plans)


def test_check_says_what_waits(folder: Path, as_on_a_gpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--model", str(folder), "--set", "text.offload=weights", "--set", "device=cpu"]) == 0
    assert "of weights wait in the host's memory and come block by block" in capsys.readouterr().out


def test_weights_that_come_and_go_are_one_threads(folder: Path, as_on_a_gpu: None) -> None:
    pipeline, _ = planned(folder, "weights")
    spec, found = pipeline.specs["text0"], []
    thread = threading.Thread(target=lambda: found.append(spec.sharing_key), name="omni-text0")
    thread.start()
    thread.join()
    assert found == ["omni-text0"] and spec.sharing_key != "omni-text0"
    assert planned(folder, "none")[0].specs["text0"].sharing_key == ""
