"""Media of a running stage are decoded beside the loop: once, with the plan that the check made, and abortable."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.ar import assert_clean, done, drain, failed, load, make_spec, make_stage, make_task, submit, tokens_of
from support.media import RATE, image_bytes, picture, plan_media, tone, video_bytes
from support.speech import SPECIAL, save_tiny_omni

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.engine.ar.engine import AREngine
from vllm_omni.engine.ar.tokenizer import TextProcessor
from vllm_omni.engine.base import Activity
from vllm_omni.errors import InvalidRequestError
from vllm_omni.media import video_input
from vllm_omni.messages import StageDone, StageEvent, StageFailed, StageRows
from vllm_omni.models.qwen2_5_omni.prompt_reader import OmniPromptReader
from vllm_omni.params import SamplingParams
from vllm_omni.worker.background import Background
from vllm_omni.worker.model_pool import ModelPool

SHORT = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
FRAMES = [picture(64, 136, seed) for seed in range(4)]
PICTURE = [{"role": "user", "content": [{"type": "image", "image": image_bytes(picture())}]}]
DAMAGED = [{"role": "user", "content": [{"type": "image", "image": image_bytes(picture())[:-100]}]}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_omni(tmp_path_factory.mktemp("omni") / "model")


@pytest.fixture(scope="module")
def pool() -> ModelPool:
    return ModelPool()


@pytest.fixture
def background() -> Iterator[Background]:
    made = Background()
    yield made
    made.shutdown()


def make_thinker(
    folder: Path, pool: ModelPool, background: Background | None = None, streamed: Any = (), **options: Any
) -> AREngine:
    stage = make_stage(folder, part="thinker", chat_template=True, max_model_len=1000, **options)
    return load(make_spec(stage), models=pool, background=background, streamed=streamed)


def ended(events: list[StageEvent]) -> dict[str, Any]:
    return {event.request_id: event for event in events if isinstance(event, (StageDone, StageFailed))}


class Gate:
    """Holds every reading back until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_open = threading.Event()
        self.entered = threading.Event()
        self.cancelled = threading.Event()
        plain = OmniPromptReader.read

        def waiting(reader: OmniPromptReader, plan: Any, stop: Any) -> Any:
            self.entered.set()
            assert self.is_open.wait(20)
            try:
                return plain(reader, plan, stop)
            except BaseException:
                self.cancelled.set()
                raise

        monkeypatch.setattr(OmniPromptReader, "read", waiting)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(monkeypatch)
    yield made
    made.is_open.set()


def test_the_others_go_on_while_a_file_is_decoded(
    folder: Path, pool: ModelPool, background: Background, gate: Gate
) -> None:
    engine = make_thinker(folder, pool, background)
    submit(engine, make_task(PICTURE, SHORT, "picture"), make_task("Hi", SHORT, "words"))
    assert gate.entered.wait(20) and engine.get_stats()["num_preparing"] == 1
    events: list[StageEvent] = []
    while engine.activity() is Activity.BUSY:
        events += engine.step()
    assert set(ended(events)) == {"words"} and engine.activity() is Activity.PENDING
    assert not engine.step()
    gate.is_open.set()
    assert len(tokens_of(ended(drain(engine))["picture"])) == 4
    assert_clean(engine)


def test_a_task_whose_file_is_damaged_fails_alone(folder: Path, pool: ModelPool, background: Background) -> None:
    engine = make_thinker(folder, pool, background)
    names = {"bad": DAMAGED, "good": PICTURE}
    submit(engine, *(make_task(prompt, SHORT, name) for name, prompt in names.items()))
    found = ended(drain(engine))
    assert "damaged or truncated" in failed(found["bad"], InvalidRequestError)
    done(found["good"])
    assert_clean(engine)


def test_an_abort_stops_the_reading_and_no_event_follows(
    folder: Path, pool: ModelPool, background: Background, gate: Gate
) -> None:
    engine = make_thinker(folder, pool, background)
    submit(engine, make_task(PICTURE, SHORT))
    assert gate.entered.wait(20)
    engine.abort("r")
    assert engine.activity() is Activity.IDLE
    gate.is_open.set()
    assert gate.cancelled.wait(20), "it would have read on"
    assert not drain(engine)
    submit(engine, make_task(PICTURE, SHORT))  # the identifier is free again
    done(ended(drain(engine))["r"])
    assert_clean(engine)


def test_a_loop_that_sleeps_is_woken_when_a_file_is_decoded(folder: Path, pool: ModelPool) -> None:
    woken = threading.Event()
    background = Background(woken.set)
    engine = make_thinker(folder, pool, background)
    submit(engine, make_task(PICTURE, SHORT))
    assert woken.wait(20) and engine.activity() is Activity.BUSY
    done(ended(drain(engine))["r"])
    background.shutdown()


def test_a_video_is_opened_once_for_its_plan_and_once_to_be_decoded(
    folder: Path, pool: ModelPool, background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    encoded: list[Any] = []

    class Counting(video_input.VideoReader):
        def __init__(self, file: Any, name: str) -> None:
            opened.append(threading.current_thread().name)
            super().__init__(file, name)

    plain = TextProcessor.encode

    def counting(processor: TextProcessor, prompt: Any) -> list[int]:
        encoded.append(prompt)
        return plain(processor, prompt)

    monkeypatch.setattr(video_input, "VideoReader", Counting)
    monkeypatch.setattr(TextProcessor, "encode", counting)
    engine = make_thinker(folder, pool, background)
    content = video_bytes([*FRAMES, *FRAMES], 4, tone(2.0))
    messages = [{"role": "user", "content": [{"type": "video", "video": content}]}]
    task = make_task(messages, SHORT)
    task.request.fields["use_audio_in_video"] = True  # type: ignore[index]
    submit(engine, task)
    done(ended(drain(engine))["r"])
    assert len(opened) == 2 and len(encoded) == 1
    assert opened[0] == threading.current_thread().name != opened[1]


def test_a_file_that_changes_after_its_check_is_refused(folder: Path, tmp_path: Path) -> None:
    reader = OmniPromptReader(folder, TextProcessor(folder).encode, LimitsConfig())
    path = tmp_path / "a.mp4"
    path.write_bytes(video_bytes(FRAMES, 4))
    plan = plan_media(reader, [{"role": "user", "content": [{"type": "video", "video": path}]}])
    path.write_bytes(video_bytes([picture(128, 136)] * 4, 4))
    with pytest.raises(InvalidRequestError, match="a file that has changed since it was checked"):
        reader.read(plan, lambda: None)


def test_reading_stops_between_frames(folder: Path) -> None:
    reader = OmniPromptReader(folder, TextProcessor(folder).encode, LimitsConfig())
    plan = plan_media(reader, [{"role": "user", "content": [{"type": "video", "video": np.stack(FRAMES)}]}])
    calls: list[int] = []

    def stop() -> None:
        calls.append(len(calls))
        if len(calls) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        reader.read(plan, stop)


def test_no_tap_shows_an_embedding_of_a_placeholder(folder: Path, pool: ModelPool, background: Background) -> None:
    """Layer 0 is zero there, wherever it stands among the layers of a port; other layers are not."""
    outputs = {"mixed": {"layers": [1, 0, -1], "tokens": "prompt"}}
    engine = make_thinker(folder, pool, background, ["mixed", "prompt_positions"], outputs=outputs)
    parts = [{"type": "audio", "audio": (tone(0.3), RATE)}, {"type": "text", "text": "What?"}]
    submit(engine, make_task([{"role": "user", "content": parts}], SHORT))
    events = drain(engine)
    rows = {event.port: event.rows for event in events if isinstance(event, StageRows)}
    first, embeddings, last = rows["mixed"].chunk(3, dim=1)
    is_silent = ~embeddings.any(dim=1)
    plan = plan_media(
        OmniPromptReader(folder, TextProcessor(folder).encode, LimitsConfig()), [{"role": "user", "content": parts}]
    )
    assert int(is_silent.sum()) == plan.parts[0].span.num_tokens and SPECIAL["audio"] in plan.token_ids
    assert first.any(dim=1).all() and last.any(dim=1).all()
    assert rows["prompt_positions"].shape == (plan.num_tokens, 3) and rows["prompt_positions"].dtype == torch.int64
