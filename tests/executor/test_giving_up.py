"""A caller that gives a stream up, in any way, leaves nothing behind: all stages end at once and hold nothing."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, closing
from typing import Any

import pytest
from support.loop import engine
from support.toy_engine import TextParams
from support.toy_sound import chain_config, speech_config
from support.toy_stream import StreamParams

from vllm_omni import AsyncOmni, Omni, OmniOutput

LONG = TextParams(steps=500)


def assert_all_is_freed(omni: Omni | AsyncOmni) -> None:
    loop = omni._executor
    assert loop.scheduler.in_flight() == set() and not loop.has_work()
    stages = loop.get_status()["stages"]
    assert len(stages) == 2 and not any(stage["tasks"] or engine(loop, name).work for name, stage in stages.items())
    loop.check_integrity()


def both_stages_run(omni: Omni | AsyncOmni) -> bool:
    return len(omni._executor.scheduler.in_flight()) == 2


def test_closing_a_stream_ends_all_its_stages_without_another_step() -> None:
    with Omni(speech_config()) as omni:
        with closing(omni.stream("a", LONG)) as stream:
            next(stream)
            assert both_stages_run(omni)
            steps = omni.get_metrics()["stages"]
        assert_all_is_freed(omni)
        assert omni.get_metrics()["aborted"] == 1 and omni.get_metrics()["stages"] == steps


def test_an_exception_in_the_callers_loop_ends_the_request() -> None:
    with Omni(speech_config()) as omni:
        with pytest.raises(ZeroDivisionError):
            for part in omni.stream("a", LONG):
                if part.audios:
                    assert both_stages_run(omni)
                    raise ZeroDivisionError
        assert_all_is_freed(omni)
        assert omni.get_metrics()["aborted"] == 1
        assert omni.generate("b")[0].error is None


@pytest.mark.parametrize("stage", ["text", "voice"])
def test_ctrl_c_in_the_step_of_a_stage_ends_the_request_in_all(stage: str) -> None:
    params = {"text": LONG, "voice": LONG, stage: TextParams(steps=500, do="interrupt")}
    with Omni(speech_config()) as omni:
        with pytest.raises(KeyboardInterrupt):
            for _ in omni.stream("a", params):
                pass
        assert_all_is_freed(omni)
        assert omni.get_metrics()["aborted"] == 1
        assert omni.generate("b")[0].error is None


@pytest.mark.parametrize("stage", ["text", "voice"])
def test_ctrl_c_while_a_stage_takes_the_task_in_ends_the_request_in_all(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Omni(speech_config()) as omni:
        taking = engine(omni, stage)
        submit = taking.submit

        def interrupted(task: Any) -> None:
            submit(task)
            raise KeyboardInterrupt

        monkeypatch.setattr(taking, "submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(omni.stream("a", LONG))
        assert_all_is_freed(omni)
        monkeypatch.undo()
        assert omni.generate("b")[0].error is None


@pytest.mark.parametrize("how", ["close", "exception", "interrupt in feed", "interrupt in step"])
def test_giving_up_in_the_middle_of_a_chain_ends_all_of_it_at_once(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Omni(chain_config(chunk=2, max_ahead=4)) as omni:
        speaker = engine(omni, "speaker")

        def interrupted(*_: Any) -> Any:
            raise KeyboardInterrupt

        with pytest.raises((KeyboardInterrupt, ZeroDivisionError)):
            with closing(omni.stream("a", {"talker": StreamParams(rows=900)})) as stream:
                for part in stream:
                    if not part.audios:
                        continue
                    assert both_stages_run(omni)
                    if how == "exception":
                        raise ZeroDivisionError
                    if how == "close":
                        break
                    monkeypatch.setattr(speaker, how.split()[-1], interrupted)
            raise ZeroDivisionError  # after `close`, which raises nothing itself
        monkeypatch.undo()
        assert_all_is_freed(omni)
        assert omni.get_metrics()["aborted"] == 1
        assert omni.generate("b")[0].audios[0].samples.shape == (2, 6)


# The same from asyncio


async def until_freed(omni: AsyncOmni) -> None:
    while omni.get_status()["running_requests"]:
        await asyncio.sleep(0.002)
    assert (await omni.get_metrics())["aborted"] == 1
    assert_all_is_freed(omni)


def run(coroutine: Any) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 20.0))


def test_aclose_ends_all_stages() -> None:
    async def main() -> None:
        async with AsyncOmni(speech_config(step_s=0.002)) as omni:
            async with aclosing(omni.stream("a", LONG)) as stream:
                async for part in stream:
                    if part.audios:
                        break
            await until_freed(omni)

    run(main())


@pytest.mark.parametrize("error", [ZeroDivisionError, asyncio.CancelledError])
def test_an_exception_or_a_cancellation_in_the_callers_loop_ends_all_stages(error: type[BaseException]) -> None:
    async def listen(omni: AsyncOmni) -> None:
        async for part in omni.stream("a", LONG):
            if part.audios:
                raise error

    async def main() -> None:
        async with AsyncOmni(speech_config(step_s=0.002)) as omni:
            with pytest.raises(error):
                await listen(omni)
            await until_freed(omni)

    run(main())


def test_cancelling_a_task_that_listens_ends_all_stages() -> None:
    async def main() -> None:
        async with AsyncOmni(speech_config(step_s=0.002)) as omni:
            heard: list[OmniOutput] = []

            async def listen() -> None:
                async for part in omni.stream("a", LONG):
                    heard.append(part)

            task = asyncio.create_task(listen())
            while not any(part.audios for part in heard):
                await asyncio.sleep(0.002)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until_freed(omni)

    run(main())
