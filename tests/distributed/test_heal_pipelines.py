"""Real pipelines, each stage in a thread, whose engines are killed in every phase: what comes out is what comes out of
a calm run, every request ends in time, and nothing is left.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support.reaper import Reaper

from vllm_omni import OmniOutput, OmniRequest
from vllm_omni.config.loader import load_config
from vllm_omni.errors import RequestTimeoutError, StageError, StageUnavailableError
from vllm_omni.executor.omni_executor import OmniExecutor
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.params import DiffusionParams

LIMIT_S = 20.0
PICTURE = ["image.defaults.num_inference_steps=4", "image.cache.policy=none", "dit_cache.prompt_embeds_mb=0"]
Loop = tuple[OmniExecutor, Reaper]


def loop_of(config: str, overrides: list[str], replicas: int = 1) -> Loop:
    loaded = load_config(config, ["device=cpu", "dtype=float32"])
    threads = [f"{name}.executor=thread" for name in loaded.stages]
    copies = [f"{name}.replicas={replicas}" for name in loaded.stages if replicas > 1]
    pipeline = Pipeline(load_config(config, [*overrides, *threads, *copies, "device=cpu", "dtype=float32"]))
    reaper = Reaper(pipeline, SystemExit)
    return OmniExecutor(pipeline), reaper


@pytest.fixture(scope="module")
def speaking() -> Iterator[Loop]:
    loop, reaper = loop_of("tiny_speech", [])
    yield loop, reaper
    loop.shutdown()


@pytest.fixture(scope="module", params=[1, 2], ids=["one engine", "two replicas"])
def drawing(request: Any) -> Iterator[Loop]:
    loop, reaper = loop_of("tiny_image", PICTURE, request.param)
    yield loop, reaper
    loop.shutdown()


def finals(loop: OmniExecutor, requests: list[OmniRequest], *, stream: bool = False) -> dict[str, list[OmniOutput]]:
    """All outputs, by request. The pauses before rebuilds are cut short: nothing here is about how long they are."""
    found: dict[str, list[OmniOutput]] = {request.request_id: [] for request in requests}
    for request in requests:
        loop.add_request(request, stream=stream)
    until = time.monotonic() + 2 * LIMIT_S
    while loop.has_work():
        for stage in loop._stages.values():
            for host in stage.hosts:
                host._recovery._due_s = min(host._recovery._due_s, time.monotonic() + 0.01)
        for output in loop.step():
            found[output.request_id].append(output)
        loop.wait()
        assert time.monotonic() < until, loop.get_status()
    return found


def settle(loop: OmniExecutor) -> None:
    """Nothing is left, and every stage works again."""
    until = time.monotonic() + LIMIT_S
    while loop.is_mending:
        loop.step()
        loop.wait()
        assert time.monotonic() < until, loop.get_status()
    loop.check_integrity()
    assert loop.scheduler.in_flight() == set()
    for name, about in loop.get_status()["stages"].items():
        assert (about["state"], about["tasks"], about["waiting"]) == ("ready", 0, 0), name
        assert all(replica["outstanding"] == 0 for replica in about["replicas"])
        assert loop._stages[name].num_buffers == 0
    for stats in loop.get_metrics()["stages"].values():
        assert stats.get("num_running", 0) == 0 and stats.get("num_free_blocks") == stats.get("num_blocks")


def pictures(names: str) -> list[OmniRequest]:
    params = DiffusionParams(seed=7)
    return [OmniRequest(prompt="a red circle", request_id=n, params=params, timeout_s=LIMIT_S) for n in names]


def test_pictures_are_the_same_wherever_encoder_or_denoiser_are_killed(drawing: Loop) -> None:
    loop, reaper = drawing
    calm = finals(loop, pictures("abc"))
    draw = random.Random(3)
    num_retried = 0
    for turn in range(8):
        phase = ("text", {draw.randrange(2)}) if turn % 4 == 0 else ("image", {draw.randrange(7)})
        reaper.begin(dict([phase]), after=turn % 2 == 1)
        shaken = finals(loop, pictures("abc"), stream=turn % 3 == 0)
        for name, (*_, output) in shaken.items():
            assert output.error is None, output.error
            same = np.asarray(output.images[0], np.int16) - np.asarray(calm[name][-1].images[0], np.int16)
            assert abs(same).max() <= 1
            num_retried += sum(stage.get("retried", 0) for stage in output.metrics.values())
        settle(loop)
    assert reaper.num_killed >= 6 and num_retried >= 6
    assert sum(about["num_retries"] for about in loop.get_status()["stages"].values()) == num_retried


def speech(words: str, timeout_s: float) -> OmniRequest:
    params = {"token2wav": DiffusionParams(seed=7)}
    return OmniRequest(prompt=f"can you read out: {words}?", request_id="r", params=params, timeout_s=timeout_s)


def test_speech_that_streams_goes_on_where_it_stopped_whichever_stage_is_killed(speaking: Loop) -> None:
    loop, reaper = speaking
    said = speech("3", LIMIT_S)
    reaper.begin({})
    (*_, calm) = finals(loop, [said])["r"]
    num_steps = dict(reaper.steps)
    draw = random.Random(5)
    kills = [(stage, draw.randrange(num_steps[stage] // 2)) for stage in ("thinker", "talker", "token2wav") * 2]
    for number, kill in enumerate(kills):
        reaper.begin({kill[0]: {kill[1]}}, after=number % 2 == 1)
        *parts, last = finals(loop, [said], stream=True)["r"]
        assert last.error is None and reaper.num_killed == number + 1, kill
        assert last.metrics[kill[0]]["retried"] == 1
        assert last.text == calm.text == "".join(part.text or "" for part in parts)
        pieces = [audio for part in parts for audio in part.audios]
        heard = np.concatenate([piece.samples for piece in pieces], axis=1)
        assert [piece.start for piece in pieces] == list(np.cumsum([0, *(p.samples.shape[1] for p in pieces[:-1])]))
        np.testing.assert_allclose(heard, calm.audios[0].samples, atol=2e-3)
        settle(loop)


def test_idle_engines_that_die_are_replaced_and_no_request_notices(drawing: Loop) -> None:
    loop, reaper = drawing
    reaper.begin({})
    for stage in ("text", "image"):
        for host in loop._stages[stage].hosts:
            kill_idle(host)
    settle(loop)
    outputs = finals(loop, pictures("de"))
    assert all(output.error is None for *_, output in outputs.values())
    settle(loop)


def kill_idle(host: Any) -> None:
    class Leave:
        def __getattribute__(self, name: str) -> Any:
            raise SystemExit("killed")

    thread = host.executor._thread
    host.executor._send(Leave())
    thread.join(LIMIT_S)
    assert not thread.is_alive()


def test_a_stage_that_dies_while_it_loads_again_ends_requests_with_the_cause_and_heals_later(speaking: Loop) -> None:
    loop, reaper = speaking
    said = speech("5", LIMIT_S)
    reaper.begin({"talker": {3}}, loads={"talker": {0}})
    (output,) = finals(loop, [said])["r"]
    assert isinstance(output.error, StageError) and "killed" in str(output.error)
    refused = finals(loop, [said])["r"][-1]
    assert isinstance(refused.error, StageUnavailableError) or refused.error is None
    settle(loop)
    assert finals(loop, [said])["r"][-1].error is None


def test_a_deadline_passes_in_the_middle_of_healing(speaking: Loop) -> None:
    loop, reaper = speaking
    reaper.begin({"thinker": {1}, "talker": set(range(2, 90, 3)), "token2wav": {0, 1}})
    said = speech("3 7 red", 0.3)
    begin = time.monotonic()
    (output,) = finals(loop, [said])["r"]
    assert isinstance(output.error, RequestTimeoutError | StageError) and time.monotonic() - begin < 2.0
    settle(loop)
