"""On a GPU: a talker whose steps are captured says what it says without graphs, and what a CPU says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.ar import assert_clean, drain, submit
from support.graphs import CalledGraphs
from support.qwen3_tts import cases, write_folder
from support.talkers import CROWD, Talkers, codes_of, crowd
from torch import Tensor

from vllm_omni import registry
from vllm_omni.engine.ar import loading
from vllm_omni.engine.ar import spec as specs
from vllm_omni.layers.attention.base import AttentionUse
from vllm_omni.layers.attention.triton import TritonAttention
from vllm_omni.utils.device import is_cuda

pytestmark = pytest.mark.cuda
SPEAKER = cases()["speaker"]


def say(talkers: Talkers, device: torch.device, **options: object) -> tuple[dict[str, Tensor], str]:
    """The codes of a crowd of which one more comes every step, and whether their steps were captured."""
    engine = talkers.engine(SPEAKER, (), streamed=("codes",), device=str(device), **options)
    events = []
    for task in crowd(8):
        submit(engine, task)
        events += engine.step()
    events += drain(engine)
    assert_clean(engine)
    return {name: codes_of(events, name).cpu() for name in CROWD}, engine.get_stats()["kernels"]["steps"]


def test_captured_frames_equal_launched_ones_and_the_cpus(
    gpu: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {}
    if is_cuda(gpu):
        complaint = TritonAttention.complaint(AttentionUse(gpu, torch.float32, 4, 16))
        if complaint is not None:
            pytest.skip(complaint)
    else:
        monkeypatch.setitem(registry.TABLES["attention"], "capturable", "support.attention:CapturableAttention")
        monkeypatch.setattr(specs, "capture_complaint", lambda *_, **__: None)
        monkeypatch.setattr(loading, "CudaGraphs", lambda device: CalledGraphs())
        options = {"attention": "capturable"}
    talkers = Talkers({SPEAKER.task: write_folder(tmp_path, SPEAKER.task)})
    captured, how = say(talkers, gpu, max_num_seqs=6, **options)
    assert how == "captured"
    launched, how = say(talkers, gpu, cuda_graphs=False, **options)
    assert how == "launched"
    expected, _ = say(talkers, torch.device("cpu"), cuda_graphs=False)
    for name in CROWD:
        assert len(captured[name]) == 8
        assert captured[name].tolist() == launched[name].tolist() == expected[name].tolist()
