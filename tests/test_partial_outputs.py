"""What a caller sees of a request while it runs: pieces of text and sound in order, then exactly one whole output."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, closing
from typing import Any

import numpy as np
import pytest
import torch
from loop_helpers import engine, executor, finish, request
from toy_engine import TextParams
from toy_sound import PIECES, RATE, chain_config, num_samples, ramp, speech_config
from toy_stream import StreamParams

from vllm_omni import AsyncOmni, Audio, Omni, OmniOutput, RequestStatus
from vllm_omni.engine.base import StageProgress, StageRows
from vllm_omni.engine.output_processor import PartialOutputs
from vllm_omni.errors import StageError

LONG = TextParams(steps=500)


def sounds(outputs: list[OmniOutput]) -> list[Audio]:
    return [audio for output in outputs for audio in output.audios]


def rows(start: int, stop: int, **changes: Any) -> StageRows:
    event = {"request_id": "r", "port": "audio", "rows": ramp(start, stop), "meta": {"sample_rate": RATE}}
    return StageRows(**{**event, **changes})


# From one event


def test_rows_of_a_listed_stage_become_a_sound_that_says_where_it_begins() -> None:
    partials = PartialOutputs(("text", "voice"))
    first, second = partials.make(rows(0, 5), "voice"), partials.make(rows(5, 8), "voice")
    assert first is not None and second is not None
    assert first.status is second.status is RequestStatus.RUNNING and first.request_id == "r"
    assert [(audio.start, audio.samples.shape, audio.sample_rate) for audio in sounds([first, second])] == [
        (0, (2, 5), RATE),
        (5, (2, 3), RATE),
    ]
    assert np.array_equal(second.results["voice"].audios[0].samples, ramp(5, 8).T.numpy())


def test_two_stages_and_two_requests_count_for_themselves() -> None:
    one, other = PartialOutputs(("a", "b")), PartialOutputs(("a", "b"))
    made = [
        one.make(rows(0, 5), "a"),
        one.make(rows(0, 2), "b"),
        one.make(rows(5, 6), "a"),
        other.make(rows(0, 4), "a"),
    ]
    assert [audio.start for partial in made if partial is not None for audio in partial.audios] == [0, 0, 5, 0]


def test_what_the_caller_did_not_ask_for_is_no_partial_and_moves_nothing() -> None:
    partials = PartialOutputs(("voice", "codes.audio"))
    assert partials.make(rows(0, 5), "unlisted") is None
    assert partials.make(rows(0, 5), "codes") is None  # its tensor is asked for, not its sound
    assert partials.make(rows(0, 5, port="codes"), "voice") is None
    assert partials.make(rows(0, 0), "voice") is None
    after = partials.make(rows(0, 5), "voice")
    assert after is not None and after.audios[0].start == 0


def test_progress_still_tells_the_step_and_the_new_words() -> None:
    partials = PartialOutputs(("text",))
    listed = partials.make(StageProgress("r", 2, 9, "ab"), "text")
    other = partials.make(StageProgress("r", 3, 9, "cd"), "encode")
    assert listed is not None and other is not None
    assert listed.text == "ab" and listed.metrics == {"text": {"step": 2, "num_steps": 9}}
    assert other.text is None and other.metrics == {"encode": {"step": 3, "num_steps": 9}}


def test_a_piece_is_the_callers_own() -> None:
    given = ramp(0, 5)
    partial = PartialOutputs(("voice",)).make(rows(0, 5, rows=given), "voice")
    assert partial is not None
    given.zero_()
    assert partial.audios[0].samples.any()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": torch.zeros(6)}, r"rows of audio are \[6\], expected \[n, channels\]"),
        ({"rows": torch.zeros(6, 2, dtype=torch.int64)}, "expected floating point"),
        ({"rows": torch.full((6, 2), float("nan"))}, "finite"),
        ({"meta": {}}, "sample_rate: got None"),
    ],
)
def test_rows_that_are_no_sound_are_a_stage_error(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(StageError, match=f"stage 'voice'.*{words}"):
        PartialOutputs(("voice",)).make(rows(0, 4, **changes), "voice")


# Through the loop


def test_pieces_come_in_order_and_add_up_to_the_one_final_output() -> None:
    with Omni(speech_config()) as omni:
        *parts, final = omni.stream("ab", TextParams(steps=6))
    assert not any(part.finished for part in parts) and final.status is RequestStatus.FINISHED
    pieces = sounds(parts)
    assert [audio.start for audio in pieces] == [0, 5, 8, 15]
    assert np.array_equal(np.concatenate([audio.samples for audio in pieces], axis=1), final.audios[0].samples)
    assert final.audios[0].start == 0 and final.audios[0].samples.shape == (2, num_samples(6))
    assert "".join(part.text or "" for part in parts) == final.text == "ab" * 6


def test_text_and_sound_come_while_both_are_still_being_made() -> None:
    with Omni(speech_config()) as omni:
        parts = list(omni.stream("a", TextParams(steps=4)))[:-1]
    kinds = ["sound" if part.audios else "text" for part in parts if part.audios or part.text]
    assert kinds.index("sound") < len(kinds) - 1 - kinds[::-1].index("text")


def test_two_streams_at_once_count_their_own_samples() -> None:
    with Omni(speech_config()) as omni:
        first, second = omni.stream("a", TextParams(steps=8)), omni.stream("b", TextParams(steps=4))
        begun = [next(first), next(first), next(second)]
        made = [sounds([*begun[:2], *first])[:-1], sounds([begun[2], *second])[:-1]]
    assert [[audio.start for audio in pieces] for pieces in made] == [[0, 5, 8, 15, 20, 23], [0, 5, 8]]


def test_a_request_that_is_not_streamed_gives_its_whole_sound_alone() -> None:
    with Omni(speech_config()) as omni:
        (output,) = omni.generate("a", TextParams(steps=4))
    assert output.audios[0].samples.shape == (2, sum(PIECES)) and output.audios[0].start == 0


@pytest.mark.parametrize("do", ["flat_rows", "no_rate", "nan_rows"])
def test_pieces_that_are_no_sound_end_their_request_alone(do: str) -> None:
    loop = executor(speech_config())
    loop.add_request(
        request("bad", params={"voice": TextParams(steps=9, do=do), "text": TextParams(steps=9)}), stream=True
    )
    loop.add_request(request("good", params=TextParams(steps=5)), stream=True)
    outputs = finish(loop)
    assert outputs["bad"].status is RequestStatus.FAILED and isinstance(outputs["bad"].error, StageError)
    assert outputs["good"].error is None and not engine(loop, "voice").work and not engine(loop, "text").work


def test_rows_of_other_ports_do_not_reach_the_caller() -> None:
    with Omni(speech_config()) as omni:
        *parts, final = omni.stream("a", {"voice": TextParams(steps=4, do="other_port")})
    assert not sounds(parts) and final.error is None and final.audios


# Through a chain of streamed stages


def test_the_first_sound_comes_while_its_codes_are_still_being_written() -> None:
    with Omni(chain_config(first_chunk=2, chunk=4, left_context=3, look_ahead=1)) as omni:
        *parts, final = omni.stream("a", {"talker": StreamParams(rows=15)})
    pieces = sounds(parts)
    assert [(audio.start, audio.samples.shape[1]) for audio in pieces] == [(0, 2), (2, 4), (6, 4), (10, 4), (14, 1)]
    assert np.array_equal(np.concatenate([audio.samples for audio in pieces], axis=1), final.audios[0].samples)
    first = next(index for index, part in enumerate(parts) if part.audios)
    talked = [["talker" in part.metrics for part in some].count(True) for some in (parts[:first], parts)]
    assert talked == [3, 15]  # two codes and one ahead, of fifteen
    assert final.metrics["talker"]["first_rows_s"] > 0 and final.metrics["speaker"]["first_rows_s"] >= 0


@pytest.mark.parametrize("how", ["close", "exception", "interrupt in feed", "interrupt in step"])
def test_giving_up_in_the_middle_of_a_chain_ends_all_of_it_at_once(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Omni(chain_config(chunk=2, max_ahead=4)) as omni:
        speaker = engine(omni._executor, "speaker")

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


def test_a_caller_that_reads_slowly_gets_the_same_and_nobody_runs_ahead() -> None:
    with Omni(chain_config(chunk=3, max_ahead=3)) as omni:
        quick = list(omni.stream("a", {"talker": StreamParams(rows=20)}))
        slow = []
        for part in omni.stream("b", {"talker": StreamParams(rows=20), "speaker": StreamParams(every=4)}):
            slow.append(part)
            omni.generate("c")  # the loop goes on for others between two pieces
    assert [audio.start for audio in sounds(slow)] == [audio.start for audio in sounds(quick)]
    assert np.array_equal(slow[-1].audios[0].samples, quick[-1].audios[0].samples)


# Giving up


def assert_all_is_freed(omni: Omni | AsyncOmni) -> None:
    loop = omni._executor
    assert loop.scheduler.in_flight() == set() and not loop.has_work() and not loop._partials
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
        taking = engine(omni._executor, stage)
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


# The same from asyncio


async def until_freed(omni: AsyncOmni) -> None:
    while omni.get_status()["running_requests"]:
        await asyncio.sleep(0.002)
    assert (await omni.get_metrics())["aborted"] == 1
    assert_all_is_freed(omni)


def run(coroutine: Any) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 20.0))


def test_pieces_reach_asyncio_in_order_too() -> None:
    async def main() -> list[OmniOutput]:
        async with AsyncOmni(speech_config()) as omni:
            return [part async for part in omni.stream("ab", TextParams(steps=6))]

    *parts, final = run(main())
    pieces = sounds(parts)
    assert [audio.start for audio in pieces] == [0, 5, 8, 15] and not any(part.finished for part in parts)
    assert np.array_equal(np.concatenate([audio.samples for audio in pieces], axis=1), final.audios[0].samples)


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
            while not sounds(heard):
                await asyncio.sleep(0.002)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until_freed(omni)

    run(main())
