"""A talker whose steps are captured, code predictor included, says what it says without graphs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.ar import assert_clean, drain, submit
from support.graphs import CalledGraphs
from support.qwen3_tts import cases, write_folder
from support.talkers import CROWD, Talkers, codes_of, crowd, make_task, stage_of
from torch import Tensor

from vllm_omni import registry
from vllm_omni.engine.ar import loading
from vllm_omni.engine.ar import spec as specs
from vllm_omni.errors import ConfigError
from vllm_omni.messages import StageFailed
from vllm_omni.params import SamplingParams
from vllm_omni.worker.ar.frames.frame_writer import FrameWriter

SPEAKER = cases()["speaker"]


@pytest.fixture(scope="module")
def talkers(tmp_path_factory: pytest.TempPathFactory) -> Talkers:
    return Talkers({SPEAKER.task: write_folder(tmp_path_factory.mktemp("talker"), SPEAKER.task)})


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[CalledGraphs]:
    """Which stages on the CPU then use."""
    called = CalledGraphs()
    monkeypatch.setitem(registry.TABLES["attention"], "capturable", "support.attention:CapturableAttention")
    monkeypatch.setattr(specs, "capture_complaint", lambda *_, **__: None)
    monkeypatch.setattr(loading, "CudaGraphs", lambda device: called)
    yield called


def say(talkers: Talkers, **options: object) -> dict[str, Tensor]:
    """The codes of a crowd of which one more comes every step."""
    engine = talkers.engine(SPEAKER, (), streamed=("codes",), attention="capturable", **options)
    events = []
    for task in crowd(8):
        submit(engine, task)
        events += engine.step()
    events += drain(engine)
    assert_clean(engine)
    return {name: codes_of(events, name) for name in CROWD}


def test_a_captured_crowd_says_what_it_says_without_graphs(talkers: Talkers, graphs: CalledGraphs) -> None:
    expected = say(talkers, cuda_graphs=False)
    assert graphs.num_captured == 0
    got = say(talkers, max_num_seqs=6)
    assert graphs.num_captured == 8  # decode steps of 1, 2, 4 and 8 rows; frames, of which there are at most 6
    assert graphs.num_replayed > 2 * 8
    for name in CROWD:
        assert len(got[name]) == 8
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=0)


def test_speeches_that_are_computed_anew_are_the_same_when_captured(talkers: Talkers, graphs: CalledGraphs) -> None:
    expected = say(talkers, cuda_graphs=False)
    got = say(talkers, num_blocks=30)
    assert graphs.num_replayed
    assert all(torch.equal(got[name], expected[name]) for name in CROWD)


def test_what_is_not_finite_fails_its_speech_alone_when_captured(talkers: Talkers, graphs: CalledGraphs) -> None:
    engine = talkers.engine(SPEAKER, (), streamed=("codes",), attention="capturable")
    writer = stage_of(engine)._writer
    fill = writer._buffers.fill
    writer._buffers.fill = lambda states, *rest: fill(  # type: ignore[method-assign]
        states.index_fill(0, torch.tensor([0]), torch.nan), *rest
    )
    params = SamplingParams(seed=1, max_tokens=3)
    submit(engine, make_task(SPEAKER, params, "bad"), make_task(SPEAKER, params, "good"))
    engine.step()
    writer._buffers.fill = fill  # type: ignore[method-assign]
    events = drain(engine)
    assert not [event for event in events if isinstance(event, StageFailed)]
    assert len(codes_of(events, "good")) == 2  # the first left with the step that failed its neighbour
    assert_clean(engine)


def test_graphs_that_cannot_be_had_are_an_error_where_they_are_asked_for(talkers: Talkers) -> None:
    with pytest.raises(ConfigError, match="cuda_graphs: got true, but got device cpu"):
        talkers.engine(SPEAKER, cuda_graphs=True)


def test_a_writer_alone_captures_the_largest_step_first(talkers: Talkers) -> None:
    engine = talkers.engine(SPEAKER)
    model, graphs = stage_of(engine)._model, CalledGraphs()
    where = torch.device("cpu")
    writer = FrameWriter(model.code_predictor, model.codec_embedding, 6, where, torch.float32, graphs)
    assert graphs.num_captured == 4 and list(writer._passes) == [1, 2, 4, 6]
