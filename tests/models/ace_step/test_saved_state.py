"""Music that is stopped after any step goes on to the same samples: its guidance keeps an average over steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.ace_step import Case, engine, random_pipeline
from torch import Tensor

from vllm_omni.engine.diffusion.engine import DiffusionEngine
from vllm_omni.messages import StageDone, StageTask

STEPS = 5
CASE = Case("x", params={"num_inference_steps": STEPS, "guidance_scale": 4.0})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ace-step")


@pytest.fixture(scope="module")
def task(folder: Path) -> StageTask:
    return CASE.task(random_pipeline(folder))


def finish(stage: DiffusionEngine) -> Tensor:
    while True:
        for event in stage.step():
            assert not hasattr(event, "error"), event
            if isinstance(event, StageDone):
                return event.payload.tensors["audio"]


def test_it_goes_on_from_every_step_to_the_same_samples(folder: Path, task: StageTask) -> None:
    stage = engine(folder)
    stage.submit(task)
    states = []
    for _ in range(STEPS - 1):
        stage.step()
        states.append(stage.save_state("x"))
    whole = finish(stage)
    for content in states:
        assert content is not None
        other = engine(folder)
        other.submit(StageTask(task.request, "music", task.params, {}, saved=content))
        assert torch.equal(finish(other), whole)


def test_without_the_average_it_would_not(folder: Path, task: StageTask) -> None:
    stage = engine(folder)
    stage.submit(task)
    stage.step()
    stage.step()
    content = stage.save_state("x")
    assert content is not None
    content["running"]["0"]["trajectory"]["average"] = None
    other = engine(folder)
    other.submit(StageTask(task.request, "music", task.params, {}, saved=content))
    assert not torch.equal(finish(other), finish(stage))
