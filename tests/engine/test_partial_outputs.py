"""What a caller sees of a request while it runs: pieces of text and sound in order, then exactly one whole output."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch
from support.loop import engine, executor, finish, request
from support.toy_engine import TextParams, text_config
from support.toy_sound import PIECES, RATE, chain_config, num_samples, ramp, speech_config
from support.toy_stream import StreamParams

from vllm_omni import AsyncOmni, Audio, Omni, OmniOutput, RequestStatus
from vllm_omni.engine.output import PartialOutputs
from vllm_omni.errors import StageError
from vllm_omni.messages import StageProgress, StageRows


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


def test_words_of_a_stage_whose_tensor_alone_is_listed_are_no_more_given_in_pieces_than_whole() -> None:
    with Omni(text_config(outputs=("text.states",))) as omni:
        *parts, final = omni.stream("ab")
    assert [part.metrics["text"]["step"] for part in parts] == [1, 2]
    assert not any(part.text for part in parts) and final.text is None and list(final.tensors) == ["text.states"]


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


def test_a_caller_that_reads_slowly_gets_the_same_and_nobody_runs_ahead() -> None:
    with Omni(chain_config(chunk=3, max_ahead=3)) as omni:
        quick = list(omni.stream("a", {"talker": StreamParams(rows=20)}))
        slow = []
        for part in omni.stream("b", {"talker": StreamParams(rows=20), "speaker": StreamParams(every=4)}):
            slow.append(part)
            omni.generate("c")  # the loop goes on for others between two pieces
    assert [audio.start for audio in sounds(slow)] == [audio.start for audio in sounds(quick)]
    assert np.array_equal(slow[-1].audios[0].samples, quick[-1].audios[0].samples)


# From asyncio


def test_pieces_reach_asyncio_in_order_too() -> None:
    async def main() -> list[OmniOutput]:
        async with AsyncOmni(speech_config()) as omni:
            return [part async for part in omni.stream("ab", TextParams(steps=6))]

    *parts, final = asyncio.run(asyncio.wait_for(main(), 20.0))
    pieces = sounds(parts)
    assert [audio.start for audio in pieces] == [0, 5, 8, 15] and not any(part.finished for part in parts)
    assert np.array_equal(np.concatenate([audio.samples for audio in pieces], axis=1), final.audios[0].samples)
