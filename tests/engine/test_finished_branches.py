"""What one branch has finished reaches a caller who streams at once, though other branches still run."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from support.toy_engine import PictureParams, TextParams, toy_config, toy_stage
from support.toy_sound import RATE, speech_config

from vllm_omni import AsyncOmni, Omni, OmniOutput, RequestStatus
from vllm_omni.config.schema import OmniConfig
from vllm_omni.engine.output import PartialOutputs
from vllm_omni.messages import StageProgress
from vllm_omni.payload import StagePayload

SLOW = 40


def branches() -> OmniConfig:
    """words -> picture beside a long story."""
    stages = {
        "words": toy_stage("words", "toy_text"),
        "picture": toy_stage("picture", "toy_picture", {"states": "words.states"}),
        "story": toy_stage("story", "toy_text"),
    }
    return toy_config(stages=stages, outputs=("picture", "story"))


def of_stage(parts: list[OmniOutput], stage: str) -> list[int]:
    return [index for index, part in enumerate(parts) if stage in part.results]


def test_a_picture_is_given_once_when_its_stage_is_finished_and_again_at_the_end() -> None:
    with Omni(branches()) as omni:
        *parts, final = omni.stream("ab", {"story": TextParams(steps=SLOW), "picture": PictureParams(seed=3)})
        (index,) = of_stage(parts, "picture")
        assert index < len(parts) / 2, "it came with the end of the story"
        given = parts[index]
        assert given.status is RequestStatus.RUNNING and not given.finished and list(given.results) == ["picture"]
        assert given.images[0].tobytes() == final.results["picture"].images[0].tobytes()
        given.images[0].putpixel((0, 0), (1, 2, 3))
        assert given.images[0].tobytes() != final.images[0].tobytes(), "each is the caller's own"
        assert "".join(part.text or "" for part in parts) == final.text == "ab" * SLOW


def test_several_pictures_come_together_in_their_order() -> None:
    with Omni(branches()) as omni:
        *parts, final = omni.stream("ab", {"story": TextParams(steps=SLOW), "picture": PictureParams(num_outputs=3)})
        (index,) = of_stage(parts, "picture")
        assert [image.tobytes() for image in parts[index].images] == [image.tobytes() for image in final.images]


def test_what_ends_with_the_request_comes_with_the_final_output_alone() -> None:
    with Omni(branches()) as omni:
        *parts, final = omni.stream("ab", {"picture": PictureParams(steps=SLOW)})
        assert of_stage(parts, "picture") == [] and len(final.images) == 1


def test_a_finished_text_says_its_end_and_repeats_no_word() -> None:
    with Omni(speech_config()) as omni:
        *parts, final = omni.stream("ab", {"voice": TextParams(steps=SLOW)})
    texts = [part.results["text"].completions[0] for part in parts if "text" in part.results]
    assert [text.finish_reason for text in texts] == [None] * (len(texts) - 1) + ["stop"]
    assert "".join(text.text for text in texts) == final.text == "abab"
    assert texts[-1].token_ids == final.token_ids


def test_finished_audio_is_not_given_twice_to_who_had_its_pieces() -> None:
    with Omni(speech_config()) as omni:
        *parts, final = omni.stream("ab", {"text": TextParams(steps=SLOW), "voice": TextParams(steps=4)})
    pieces = [audio for part in parts for audio in part.audios]
    assert np.array_equal(np.concatenate([piece.samples for piece in pieces], axis=1), final.audios[0].samples)


def test_audio_that_was_not_streamed_is_given_when_it_is_finished() -> None:
    payload = StagePayload("r", "voice", {"audio": torch.zeros(2, 1, 8)}, {"sample_rate": RATE})
    output = PartialOutputs(("voice",)).finished(payload, "voice")
    assert output is not None and [audio.samples.shape for audio in output.audios] == [(1, 8), (1, 8)]


def test_every_sample_of_a_text_is_given_at_its_end() -> None:
    partials = PartialOutputs(("text",))
    partials.make(StageProgress("r", 1, 2, "on"), "text")
    completions = [{"text": text, "token_ids": [1], "finish_reason": "length"} for text in ("one", "two")]
    output = partials.finished(StagePayload("r", "text", meta={"completions": completions}), "text")
    assert output is not None and [completion.text for completion in output.completions] == ["e", "two"]


@pytest.mark.parametrize("outputs", [(), ("picture.latents",), ("other",)])
def test_a_stage_that_outputs_do_not_list_gives_nothing(outputs: tuple[str, ...]) -> None:
    payload = StagePayload("r", "picture", {"image": torch.zeros(1, 8, 8, 3, dtype=torch.uint8)})
    assert PartialOutputs(outputs).finished(payload, "picture") is None


def test_a_picture_that_cannot_be_shown_ends_its_request_alone() -> None:
    with Omni(branches()) as omni:
        params = {"story": TextParams(steps=SLOW), "picture": PictureParams(do="bad_image")}
        *_, final = omni.stream("ab", params)
        assert final.status is RequestStatus.FAILED and "torch.float32" in str(final.error)
        assert omni.generate("ab")[0].error is None


def test_a_branch_reaches_asyncio_too() -> None:
    async def main() -> list[OmniOutput]:
        async with AsyncOmni(branches()) as omni:
            return [part async for part in omni.stream("ab", {"story": TextParams(steps=SLOW)})]

    *parts, final = asyncio.run(asyncio.wait_for(main(), 20.0))
    assert final.finished and len(of_stage(parts, "picture")) == 1
