"""Whole pipelines with every stage in a process of its own: words, pictures, streams, errors and ends are those of one
process.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vllm_omni import DiffusionParams, Omni, OmniOutput, RequestStatus, SamplingParams
from vllm_omni.errors import InvalidRequestError, RequestTimeoutError

APART = ["executor=process"]
PROMPT = "a violet star above a golden ring"
SPOKEN = {"token2wav": DiffusionParams(seed=1)}
FEW_STEPS = DiffusionParams(seed=3, num_inference_steps=3)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Here as in the processes, which share the threads of this one out: with another number sums round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def scenes() -> Iterator[tuple[Omni, Omni]]:
    """Words to text to a picture: in one process, and with writer and painter in another each."""
    with (
        Omni("tiny_scene", progress=False, dtype="float32") as inline,
        Omni("tiny_scene", progress=False, dtype="float32", overrides=[*APART, "negative.executor=inline"]) as apart,
    ):
        yield inline, apart


@pytest.fixture(scope="module")
def voices() -> Iterator[tuple[Omni, Omni]]:
    """Text to speech, streamed from stage to stage: in one process, and between three."""
    with (
        Omni("tiny_speech", progress=False, dtype="float32") as inline,
        Omni("tiny_speech", progress=False, dtype="float32", overrides=[*APART, "thinker.executor=thread"]) as apart,
    ):
        yield inline, apart


def test_models_of_all_processes_are_counted(scenes: tuple[Omni, Omni]) -> None:
    inline, apart = scenes
    assert inline.get_metrics()["num_models"] == 2, "writer and negative share their weights"
    assert apart.get_metrics()["num_models"] == 3


def content(output: OmniOutput) -> dict[str, Any]:
    """What a caller gets, comparable."""
    assert output.error is None, output.error
    return {
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "images": [np.asarray(image).tobytes() for image in output.images],
        "audios": [(audio.sample_rate, audio.samples.tobytes()) for audio in output.audios],
        "tensors": {name: tensor.tolist() for name, tensor in output.tensors.items()},
        "steps": {name: counts.get("steps") for name, counts in output.metrics.items()},
    }


@pytest.mark.parametrize(
    "params",
    [
        FEW_STEPS,
        DiffusionParams(seed=5, num_inference_steps=2, guidance_scale=3.0, negative_prompt="blue", num_outputs=2),
        {"writer": SamplingParams(temperature=0.9, seed=11, n=1, logprobs=2), "image": FEW_STEPS},
    ],
    ids=["plain", "guided", "sampled"],
)
def test_words_and_pictures_are_those_of_one_process(scenes: tuple[Omni, Omni], params: Any) -> None:
    (here,), (there,) = (omni.generate(PROMPT, params) for omni in scenes)
    assert content(here) == content(there)
    assert here.logprobs == there.logprobs


def test_pictures_that_a_request_brings_reach_another_process(scenes: tuple[Omni, Omni]) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    file = io.BytesIO()
    picture.save(file, format="PNG")
    params = DiffusionParams(seed=1, num_inference_steps=4, strength=0.5)
    found = []
    for source in (picture, file.getvalue(), np.asarray(picture)):
        for omni in scenes:
            (output,) = omni.generate({"prompt": PROMPT, "image": source}, params)
            found.append(content(output)["images"])
    assert found == found[:1] * 6


def test_a_stream_gives_the_same_parts(scenes: tuple[Omni, Omni]) -> None:
    def parts(omni: Omni) -> list[Any]:
        given = list(omni.stream(PROMPT, DiffusionParams(seed=3, num_inference_steps=3, num_previews=1)))
        words = "".join(part.text or "" for part in given[:-1])
        steps = [part.metrics["image"]["step"] for part in given[:-1] if "image" in part.metrics]
        previews = [np.asarray(image).tobytes() for part in given[:-1] for image in part.images]
        return [words, steps, previews, content(given[-1])]

    assert parts(scenes[0]) == parts(scenes[1])


def test_speech_streams_between_processes_to_the_same_samples(voices: tuple[Omni, Omni]) -> None:
    def speak(omni: Omni) -> list[Any]:
        given = list(omni.stream("can you read out: two red stars?", SPOKEN))
        pieces = [piece.samples for part in given[:-1] for piece in part.audios]
        assert len(pieces) > 1
        (whole,) = given[-1].audios
        assert np.array_equal(np.concatenate(pieces, axis=1), whole.samples)
        return [content(given[-1]), [piece.shape for piece in pieces]]

    assert speak(voices[0]) == speak(voices[1])


def test_several_requests_at_once_stay_apart(voices: tuple[Omni, Omni]) -> None:
    prompts = ["read 3", "read 7 red", "can you read out: blue?"]
    expected = [voices[0].generate(prompt, SPOKEN)[0] for prompt in prompts]
    found = voices[1].generate(prompts, SPOKEN)
    for one, other in zip(expected, found, strict=True):
        assert one.text == other.text and one.error is other.error is None
        difference = np.abs(one.audios[0].samples - other.audios[0].samples).max()
        assert difference < 1e-4, "only by how sums of a batch round"


def test_errors_deadlines_and_aborts_are_those_of_one_process(scenes: tuple[Omni, Omni]) -> None:
    for omni in scenes:
        refused, torn = (
            omni.generate(PROMPT, params={"writer": SamplingParams(max_tokens=10**6), "image": FEW_STEPS})[0],
            omni.generate({"prompt": PROMPT, "image": b"no picture"}, DiffusionParams(strength=0.5))[0],
        )
        assert isinstance(refused.error or torn.error, InvalidRequestError) and torn.error is not None
        assert "no whole image" in str(torn.error)
        late = omni.generate({"prompt": PROMPT, "timeout_s": 0.15}, DiffusionParams(num_inference_steps=900))[0]
        assert late.status is RequestStatus.FAILED and isinstance(late.error, RequestTimeoutError)
        with closing(omni.stream(PROMPT, DiffusionParams(num_inference_steps=900))) as parts:
            next(parts)
        stages = omni.get_metrics()["stages"]
        assert stages["image"]["running"] == 0 and stages["image"]["step_cache_used_bytes"] == 0
        assert stages["writer"]["num_free_blocks"] == stages["writer"]["num_blocks"]


def test_a_picture_that_is_stopped_goes_on_in_another_process(scenes: tuple[Omni, Omni], tmp_path: Path) -> None:
    params = DiffusionParams(seed=7, num_inference_steps=6)
    (whole,) = scenes[0].generate(PROMPT, params)
    for number, (saver, other) in enumerate([scenes, scenes[::-1]]):
        path = tmp_path / f"{number}.safetensors"
        with closing(saver.stream(PROMPT, params)) as parts:
            for part in parts:
                if "image" in part.progress and part.progress["image"].step >= 2 and not path.exists():
                    saver.save_state(part.request_id, path)
                    break
        resumed = other.resume(path)
        assert resumed.error is None
        assert np.asarray(resumed.images[0]).tobytes() == np.asarray(whole.images[0]).tobytes()
