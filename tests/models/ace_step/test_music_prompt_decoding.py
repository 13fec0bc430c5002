"""Audio that a request brings: decoded in the background, at the model's rate, alone in its failure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from support.music import RATE, Prompter, sound

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.engine.base import Activity
from vllm_omni.errors import StageError
from vllm_omni.media.audio_files import BLOCK_FRAMES
from vllm_omni.messages import StageDone, StageFailed
from vllm_omni.models.ace_step.prompt import stage as prompt_stage
from vllm_omni.models.ace_step.prompt.request_reader import MusicRequestReader


def test_a_sound_may_be_a_file_and_one_that_goes_bad_fails_its_request_alone(
    prompter: Prompter, tmp_path: Path
) -> None:
    path = tmp_path / "song.flac"
    sound(1.0).save(path)
    good = prompter.task(task_type="cover", audio=str(path))
    bad = prompter.task(task_type="cover", audio=sound(), reference_audio=path)
    samples = sound().samples.copy()
    samples[0, 5] = np.nan
    worse = prompter.task(task_type="cover", audio=(samples, RATE))
    prompter.engine.submit(good)
    (done,) = prompter.events(1)
    assert isinstance(done, StageDone) and done.payload.tensors["source_audio"].shape == (2, RATE)
    path.write_bytes(b"gone")
    tasks = (bad, prompter.task(), worse)
    for task in tasks:
        prompter.engine.submit(task)
    found = {event.request_id: event for event in prompter.events(3)}
    first, plain, second = (found[task.request_id] for task in tasks)
    assert isinstance(first, StageFailed) and "reference_audio: got a file that is no sound" in str(first.error)
    assert isinstance(second, StageFailed) and "audio: got samples that are NaN" in str(second.error)
    assert isinstance(plain, StageDone) and prompter.engine.activity() is Activity.IDLE


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Event]:
    """Decoding stands still until it is set."""
    gate, read_audio = Event(), prompt_stage.read_audio

    def held(*args: Any, **kwargs: Any) -> Any:
        assert gate.wait(30)
        return read_audio(*args, **kwargs)

    monkeypatch.setattr(prompt_stage, "read_audio", held)
    yield gate
    gate.set()


def test_while_audio_is_decoded_other_requests_are_answered_and_submit_decodes_nothing(
    prompter: Prompter, gate: Event
) -> None:
    slow, quick = prompter.task(task_type="cover", audio=sound()), [prompter.task(), prompter.task()]
    assert prompter.engine.activity() is Activity.IDLE
    prompter.engine.submit(slow)
    assert prompter.engine.activity() is Activity.PENDING and prompter.engine.step() == []
    for task in quick:
        prompter.engine.submit(task)
    assert prompter.engine.activity() is Activity.BUSY
    for task in quick:
        (event,) = prompter.engine.step()
        assert isinstance(event, StageDone) and event.request_id == task.request_id
    assert prompter.engine.activity() is Activity.PENDING and prompter.engine.get_stats() == {"queued": 1}
    gate.set()
    (event,) = prompter.events(1)
    assert isinstance(event, StageDone) and event.request_id == slow.request_id
    assert event.payload.tensors["source_audio"].shape == (2, 2 * RATE)


def test_abort_while_audio_is_decoded_leaves_nothing_and_what_waits_is_never_decoded(
    prompter: Prompter, gate: Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[object] = []
    decode = prompt_stage.decode
    monkeypatch.setattr(prompt_stage, "decode", lambda asked, *rest: (begun.append(asked), decode(asked, *rest))[1])
    tasks = [prompter.task(task_type="cover", audio=sound(), reference_audio=sound()) for _ in range(5)]
    for task in tasks:
        prompter.engine.submit(task)
    for task in tasks[:4]:
        prompter.engine.abort(task.request_id)
    assert prompter.engine.get_stats() == {"queued": 1}
    gate.set()
    (event,) = prompter.events(1)
    assert event.request_id == tasks[4].request_id
    assert not any(asked is task.prepared for asked in begun for task in tasks[2:4])
    assert prompter.engine.activity() is Activity.IDLE and prompter.engine.step() == []


def test_decoding_ends_between_two_blocks_when_nobody_wants_it_any_more(prompter: Prompter, tmp_path: Path) -> None:
    path = tmp_path / "long.wav"
    sound(BLOCK_FRAMES * 10 / RATE).save(path)
    asked, calls = prompter.check(task_type="cover", audio=path), 0

    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise CancelledError

    with pytest.raises(CancelledError):
        prompt_stage.decode(asked, prompter.spec.geometry, LimitsConfig(), stop)
    assert calls == 3


def test_a_defect_in_decoding_fails_its_request_alone_and_names_the_stage(
    prompter: Prompter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_stage, "read_audio", lambda *_, **__: 1 / 0)
    tasks = [prompter.task(task_type="cover", audio=sound()), prompter.task()]
    for task in tasks:
        prompter.engine.submit(task)
    found = {event.request_id: event for event in prompter.events(2)}
    failed = found[tasks[0].request_id]
    assert isinstance(failed, StageFailed) and isinstance(failed.error, StageError)
    assert "stage 'prompt' failed: ZeroDivisionError" in str(failed.error)
    assert isinstance(found[tasks[1].request_id], StageDone)


def test_abort_drops_a_request_and_unknown_ids_are_fine(prompter: Prompter) -> None:
    task = prompter.task()
    prompter.engine.submit(task)
    prompter.engine.abort(task.request_id)
    prompter.engine.abort("unknown")
    assert prompter.engine.activity() is Activity.IDLE and prompter.engine.step() == []


def test_a_request_is_read_once_and_an_edge_brings_its_words_later(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompter = Prompter(folder, inputs={"prompt": "writer.text"}, limits=LimitsConfig(max_prompt_chars=500))
    assert prompter.spec.signature.required_inputs == {"prompt"}
    tasks = [prompter.task(prompt=[1, 2], lyrics="la", duration_s=2) for _ in range(2)]  # its own prompt is not read
    monkeypatch.setattr(MusicRequestReader, "read", lambda *_: pytest.fail("read again"))
    for task, words in zip(tasks, ("soft bells", "x" * 501), strict=True):
        prompter.engine.submit(dataclasses.replace(task, inputs={"prompt": words}))
    done, failed = prompter.events(2)
    assert isinstance(done, StageDone) and "# Caption\nsoft bells\n" in done.payload.meta["caption"]
    assert isinstance(failed, StageFailed) and "prompt: got 501 characters" in str(failed.error)
