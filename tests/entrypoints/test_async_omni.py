from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest
from support.loop import engine
from support.toy_engine import PictureParams, TextParams, text_config, toy_config

from vllm_omni import AsyncOmni, OmniOutput, RequestStatus
from vllm_omni.config.schema import OmniConfig, SchedulerConfig
from vllm_omni.entrypoints import async_omni
from vllm_omni.errors import (
    InvalidRequestError,
    QueueFullError,
    RequestAbortedError,
    RequestTimeoutError,
    SchedulerError,
)

T = TypeVar("T")
LIMIT_S = 20.0
HANG = TextParams(do="hang")


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs to the end, or fails instead of hanging."""
    return asyncio.run(asyncio.wait_for(coroutine, LIMIT_S))


def text_omni(**changes: Any) -> AsyncOmni:
    return AsyncOmni(text_config(step_s=0.002, **changes))


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def busy(omni: AsyncOmni, count: int = 1) -> Any:
    return lambda: len(engine(omni, "text").work) == count


def test_many_requests_at_once_get_their_own_answers() -> None:
    async def main() -> list[OmniOutput]:
        async with text_omni() as omni:
            calls = (omni.generate(str(index), TextParams(steps=1 + index % 5)) for index in range(50))
            return await asyncio.gather(*calls)

    assert [output.text for output in run(main())] == [str(index) * (1 + index % 5) for index in range(50)]


def test_requests_that_come_while_others_run_join_the_batch() -> None:
    async def main() -> int:
        async with text_omni() as omni:
            slow = asyncio.create_task(omni.generate("a", TextParams(steps=50)))
            await until(busy(omni))
            await omni.generate("b")
            assert not slow.done()
            await slow
            return engine(omni, "text").max_batch

    assert run(main()) == 2


def test_a_stream_gives_parts_and_then_exactly_one_final_output() -> None:
    async def main() -> list[OmniOutput]:
        async with text_omni() as omni:
            return [part async for part in omni.stream("ab", TextParams(steps=3))]

    outputs = run(main())
    assert [output.finished for output in outputs] == [False] * 3 + [True]
    assert "".join(output.text or "" for output in outputs[:-1]) == outputs[-1].text


def test_several_stages_work_as_in_omni() -> None:
    async def main() -> OmniOutput:
        async with AsyncOmni(toy_config()) as omni:
            return await omni.generate("ab", PictureParams(guided=True, num_outputs=2))

    output = run(main())
    assert len(output.images) == 2 and set(output.metrics) == {"encode", "guide", "picture"}


@pytest.mark.parametrize(
    ("prompt", "params"), [({"promt": "x"}, None), ("x", TextParams(do="reject")), ("x", PictureParams()), (7, None)]
)
def test_a_bad_request_is_one_rejected_output(prompt: Any, params: Any) -> None:
    async def main() -> list[OmniOutput]:
        async with text_omni() as omni:
            return [await omni.generate(prompt, params)] + [part async for part in omni.stream(prompt, params)]

    outputs = run(main())
    assert len(outputs) == 2
    assert all(isinstance(o.error, InvalidRequestError) and o.status is RequestStatus.REJECTED for o in outputs)


def test_a_full_queue_and_an_id_in_use_are_rejected_outputs() -> None:
    async def main() -> None:
        omni = text_omni(scheduler=SchedulerConfig(max_queue_size=1, max_running=1))
        first = asyncio.create_task(omni.generate({"prompt": "a", "request_id": "a"}, HANG))
        await until(busy(omni))
        second = asyncio.create_task(omni.generate("b"))
        await until(lambda: omni.get_status()["queue_size"] == 1)
        full, double = await omni.generate("c"), await omni.generate({"prompt": "d", "request_id": "a"})
        assert isinstance(full.error, QueueFullError) and full.status is RequestStatus.REJECTED
        assert isinstance(double.error, SchedulerError) and "in use" in str(double.error)
        omni.abort("a")
        assert (await first).status is RequestStatus.ABORTED
        assert (await second).text == "bb"
        await omni.shutdown()

    run(main())


def test_abort_ends_one_request_and_leaves_the_others() -> None:
    async def main() -> None:
        async with text_omni() as omni:
            doomed = asyncio.create_task(omni.generate({"prompt": "a", "request_id": "doomed"}, HANG))
            other = asyncio.create_task(omni.generate("b", TextParams(steps=20)))
            await until(busy(omni, 2))
            omni.abort("doomed")
            omni.abort("unknown")
            output = await doomed
            assert output.status is RequestStatus.ABORTED and isinstance(output.error, RequestAbortedError)
            assert (await other).error is None

    run(main())


@pytest.mark.parametrize("is_stream", [True, False])
def test_cancelling_the_awaiting_task_aborts_the_request(is_stream: bool) -> None:
    async def listen(omni: AsyncOmni) -> None:
        if is_stream:
            async for _ in omni.stream("a", HANG):
                pass
        else:
            await omni.generate("a", HANG)

    async def main() -> None:
        async with text_omni() as omni:
            task = asyncio.create_task(listen(omni))
            await until(busy(omni))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(busy(omni, 0))
            assert (await omni.get_metrics())["aborted"] == 1
            assert (await omni.generate("b")).text == "bb"

    run(main())


def test_leaving_a_stream_early_aborts_the_request() -> None:
    async def main() -> None:
        async with text_omni() as omni:
            stream = omni.stream("a", TextParams(steps=50))
            async for _ in stream:
                break
            await stream.aclose()
            await until(busy(omni, 0))
            assert (await omni.get_metrics())["aborted"] == 1

    run(main())


def test_giving_up_a_refused_duplicate_does_not_abort_the_request_that_has_the_id() -> None:
    async def main() -> None:
        async with text_omni() as omni:
            prompt = {"prompt": "a", "request_id": "same"}
            first = asyncio.create_task(omni.generate(prompt, TextParams(steps=50)))
            await until(busy(omni))
            for _ in range(5):
                double = asyncio.create_task(omni.generate(prompt))
                await asyncio.sleep(0)
                double.cancel()
            assert (await first).error is None

    run(main())


def test_an_id_may_be_used_again_at_once_after_an_abort() -> None:
    """Both commands come while the loop is between the same two steps."""

    async def main() -> tuple[OmniOutput, OmniOutput]:
        async with text_omni() as omni:
            first = asyncio.create_task(omni.generate({"prompt": "a", "request_id": "same"}, HANG))
            await until(busy(omni))
            omni._loop.run(lambda executor: time.sleep(0.3))
            omni.abort("same")
            second = asyncio.create_task(omni.generate({"prompt": "b", "request_id": "same"}, TextParams(steps=2)))
            return await first, await second

    aborted, answered = run(main())
    assert aborted.status is RequestStatus.ABORTED
    assert answered.error is None and answered.text == "bb"


def test_shutdown_drains() -> None:
    async def main() -> list[OmniOutput]:
        omni = text_omni(scheduler=SchedulerConfig(max_running=1))
        tasks = [asyncio.create_task(omni.generate(str(index), TextParams(steps=50))) for index in range(4)]
        await until(busy(omni))
        await omni.shutdown()
        await omni.shutdown(drain=False)
        assert omni.get_status()["alive"] is False
        late = await omni.generate("late")
        assert late.status is RequestStatus.REJECTED and "shut down" in str(late.error)
        with pytest.raises(SchedulerError):
            await omni.get_metrics()
        return await asyncio.gather(*tasks)

    assert [output.error for output in run(main())] == [None] * 4


def test_shutdown_without_draining_aborts_at_once() -> None:
    async def main() -> list[OmniOutput]:
        omni = text_omni(scheduler=SchedulerConfig(max_running=1))
        tasks = [asyncio.create_task(omni.generate("a", HANG)) for _ in range(3)]
        await until(busy(omni))
        draining = asyncio.create_task(omni.shutdown())
        await asyncio.sleep(0.01)
        assert not draining.done()
        await omni.shutdown(drain=False)
        await draining
        return await asyncio.gather(*tasks)

    assert {output.status for output in run(main())} == {RequestStatus.ABORTED}


def test_a_dead_loop_fails_every_pending_request_with_its_cause() -> None:
    async def main() -> None:
        omni = text_omni()
        tasks = [asyncio.create_task(omni.generate("a", HANG)) for _ in range(3)]
        stream = asyncio.create_task(anext_of(omni))
        await until(busy(omni, 4))

        def broken() -> list[OmniOutput]:
            raise ZeroDivisionError("the loop itself")

        omni._executor.step = broken
        for output in [*await asyncio.gather(*tasks), await stream]:
            assert output.status is RequestStatus.FAILED and isinstance(output.error.__cause__, ZeroDivisionError)
        later = await omni.generate("b")
        assert later.status is RequestStatus.REJECTED and isinstance(later.error.__cause__, ZeroDivisionError)
        assert omni.get_status()["alive"] is False
        await omni.shutdown()

    async def anext_of(omni: AsyncOmni) -> OmniOutput:
        parts = [part async for part in omni.stream("a", HANG)]
        return parts[-1]

    run(main())


def test_a_bug_while_adding_fails_that_request_too() -> None:
    async def main() -> None:
        omni = text_omni()

        def broken(*_: Any, **__: Any) -> None:
            raise ZeroDivisionError("while adding")

        omni._executor.add_request = broken
        outputs = await asyncio.gather(*(omni.generate(str(index)) for index in range(3)))
        assert all(isinstance(output.error.__cause__, ZeroDivisionError) for output in outputs)

    run(main())


def test_an_engine_that_raises_does_not_kill_the_loop() -> None:
    async def main() -> None:
        async with text_omni() as omni:
            bad = await omni.generate("a", TextParams(do="raise"))
            assert bad.status is RequestStatus.FAILED and isinstance(bad.error.__cause__, RuntimeError)
            assert (await omni.generate("b")).text == "bb"

    run(main())


def test_an_event_loop_that_is_gone_harms_nobody() -> None:
    omni = text_omni()
    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(asyncio.wait_for(omni.generate("a", HANG), 0.05))

    async def leave() -> None:
        asyncio.create_task(omni.generate("a", TextParams(steps=50)))  # noqa: RUF006
        await asyncio.sleep(0)

    asyncio.run(leave())
    assert run(omni.generate("b")).text == "bb"
    run(omni.shutdown())


def test_it_sleeps_while_there_is_nothing_to_do() -> None:
    async def main() -> float:
        async with text_omni() as omni:
            await omni.generate("a")
            before = time.process_time()
            await asyncio.sleep(0.2)
            return time.process_time() - before

    assert run(main()) < 0.1


def test_the_thread_ends_with_shutdown() -> None:
    async def main() -> None:
        async with text_omni() as omni:
            await omni.generate("a")
            (thread,) = (found for found in threading.enumerate() if found.name == "omni-loop")
        thread.join(timeout=5)
        assert not thread.is_alive()

    run(main())


def test_a_deadline_acts_in_the_thread_too() -> None:
    async def main() -> OmniOutput:
        config: OmniConfig = text_config(request_timeout=0.05)
        async with AsyncOmni(config) as omni:
            return await omni.generate("a", HANG)

    assert "0.05 s" in str(run(main()).error)


def test_a_loop_that_hangs_beyond_a_deadline_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_omni, "GRACE_S", 0.05)
    released = threading.Event()

    async def main() -> tuple[OmniOutput, OmniOutput]:
        async with text_omni() as omni:
            omni._loop.run(lambda executor: released.wait(LIMIT_S))
            try:
                given_up = await omni.generate({"prompt": "a", "timeout_s": 0.05})
            finally:
                released.set()
            return given_up, await omni.generate("b")

    given_up, after = run(main())
    assert isinstance(given_up.error, RequestTimeoutError) and "stuck" in str(given_up.error)
    assert after.text == "bb"


def test_outputs_that_come_before_anybody_looks_wake_the_event_loop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> tuple[list[str | None], int]:
        async with text_omni() as omni:
            events, wakes = asyncio.get_running_loop(), []
            call_soon = events.call_soon_threadsafe

            def counted(callback: Any, *arguments: Any, **options: Any) -> Any:
                if threading.current_thread().name == "omni-loop":
                    wakes.append(callback)
                return call_soon(callback, *arguments, **options)

            monkeypatch.setattr(events, "call_soon_threadsafe", counted)
            calls = [asyncio.ensure_future(omni.generate(str(number))) for number in range(8)]
            await asyncio.sleep(0)  # they are submitted
            time.sleep(0.5)  # nobody looks
            return [output.text for output in await asyncio.gather(*calls)], len(wakes)

    texts, num_wakes = run(main())
    assert texts == [2 * str(number) for number in range(8)]
    assert num_wakes == 1


def test_without_steps_only_what_there_is_to_show_comes_and_find_tells_the_way() -> None:
    async def main() -> tuple[list[OmniOutput], list[OmniOutput], int]:
        params = {"encode": TextParams(steps=20), "picture": PictureParams(steps=20)}
        async with AsyncOmni(toy_config()) as omni:
            all_of_them = [output async for output in omni.stream("x", params)]
            many = {"encode": TextParams(steps=1000), "picture": PictureParams(steps=20)}  # for this thread to see some
            streaming = omni.stream({"prompt": "x", "request_id": "r"}, many, steps=False)
            first = asyncio.ensure_future(anext(streaming))
            steps = 0
            while not first.done():
                position = omni.find("r")
                steps = max([steps, *(at.step for at in position.progress.values())]) if position else steps
                await asyncio.sleep(0)
            return all_of_them, [await first, *[output async for output in streaming]], steps

    everything, shown, steps = run(main())
    assert any(not output.results and not output.finished for output in everything)
    assert all(output.results or output.finished for output in shown) and steps > 0
