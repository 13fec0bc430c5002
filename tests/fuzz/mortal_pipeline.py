"""Pipelines of which each stage is in a process that can be killed, and what is asked of them. What these requests come
to, undisturbed, is known before anything happens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import yaml
from support.driver import Driver
from support.mortal_stages import register_mortals
from support.toy_engine import PictureParams

from vllm_omni import DiffusionParams, OmniOutput, OmniRequest, SamplingParams
from vllm_omni.config.loader import load_config
from vllm_omni.config.schema import OmniConfig
from vllm_omni.config.shipped import shipped_configs
from vllm_omni.executor.omni_executor import OmniExecutor
from vllm_omni.executor.pipeline import Pipeline

PICTURE, SPEECH = ("writer", "image"), ("thinker", "token2wav")
LIMIT_S = 60.0  # the deadline of a request that is to be answered
AUDIO_TOLERANCE = 2e-3  # by how sums of a batch round, as in every test of speech that is killed


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request that is known by what it comes to."""

    name: str
    prompt: str
    outputs: tuple[str, ...]
    params: Any

    def request(self, request_id: str, timeout_s: float = LIMIT_S) -> OmniRequest:
        return OmniRequest(
            prompt=self.prompt, request_id=request_id, params=self.params, outputs=self.outputs, timeout_s=timeout_s
        )


@dataclasses.dataclass(frozen=True)
class Scene:
    """A pipeline, and the requests that it can be asked for."""

    config: OmniConfig
    known: Sequence[Asked]


def pictures_and_speech() -> Scene:
    """Words to text to a picture, drawn by two replicas, and text to speech that is streamed from stage to stage."""
    stages = _stages("tiny_scene", "asset://tiny-image")
    del stages["negative"], stages["image"]["inputs"]["negative_prompt_embeds"]
    stages["image"]["replicas"] = 2
    stages |= _stages("tiny_speech", "asset://tiny-speech")
    steps = DiffusionParams(seed=3, num_inference_steps=12)
    two = dataclasses.replace(steps, num_outputs=2, num_inference_steps=6)
    drawn = {"writer": SamplingParams(temperature=0.9, seed=11, max_tokens=24), "image": steps}
    known = [
        Asked("picture", "a violet star above a golden ring", PICTURE, steps),
        Asked("two pictures", "a red circle", PICTURE, two),
        Asked("words that are drawn", "a blue square", PICTURE, drawn),
        Asked("one word", "can you read out: 3?", SPEECH, {"token2wav": DiffusionParams(seed=1)}),
        Asked("three words", "can you read out: two red stars?", SPEECH, {"token2wav": DiffusionParams(seed=2)}),
    ]
    return Scene(_config(stages, [*PICTURE, *SPEECH]), known)


def plain_pictures() -> Scene:
    """Words to text to a plain picture. The image stage waits in its steps and needs no library of diffusion, of which
    the import takes most of the time in which another process is there.
    """
    writer = _stages("tiny_scene", "asset://tiny-image")["writer"]
    image = {"kind": "mortal_painter", "inputs": {"states": "writer.hidden_states"}, "step_s": 0.02}
    drawn = {
        "writer": SamplingParams(temperature=0.9, seed=11, max_tokens=24),
        "image": PictureParams(steps=12, seed=3),
    }
    known = [
        Asked("picture", "a violet star above a golden ring", PICTURE, {"image": PictureParams(steps=12)}),
        Asked("words that are drawn", "a blue square", PICTURE, drawn),
    ]
    return Scene(_config({"writer": writer, "image": image}, PICTURE), known)


def _config(stages: Mapping[str, Any], outputs: Sequence[str]) -> OmniConfig:
    register_mortals()
    return load_config(
        {
            "name": "mortal",
            "stages": dict(stages),
            "outputs": list(outputs),
            "executor": "process",
            "resources": {"threads": 1},
            "dit_cache": {"prompt_embeds_mb": 0},
        },
        ["device=cpu", "dtype=float32"],
    )


def _stages(config: str, model: str) -> dict[str, Any]:
    text = shipped_configs()[config].read_text().replace("${model}", model)
    stages: dict[str, Any] = yaml.safe_load(text)["stages"]
    for stage in stages.values():
        stage["kind"] = f"mortal_{stage['kind']}"
    return stages


def calm_results(scene: Scene) -> Mapping[str, OmniOutput]:
    """In this process, by name."""
    config = scene.config
    stages = {name: dataclasses.replace(stage, executor="inline", replicas=1) for name, stage in config.stages.items()}
    driver = Driver(OmniExecutor(Pipeline(dataclasses.replace(config, stages=stages))))
    found = {each.name: driver.answer(each.request(each.name)) for each in scene.known}
    driver.loop.shutdown()
    assert all(output.error is None for output in found.values()), found
    return found


def check_same(found: OmniOutput, parts: Sequence[OmniOutput], calm: OmniOutput) -> None:
    """found: the final one of a request that streamed `parts`, or none."""
    assert (found.text, found.token_ids, found.finish_reason) == (calm.text, calm.token_ids, calm.finish_reason)
    assert len(found.images) == len(calm.images) and len(found.audios) == len(calm.audios)
    for image, expected in zip(found.images, calm.images, strict=True):
        difference = np.asarray(image, np.int16) - np.asarray(expected, np.int16)
        assert abs(difference).max() <= 1, "another picture"
    for audio, spoken in zip(found.audios, calm.audios, strict=True):
        np.testing.assert_allclose(audio.samples, spoken.samples, atol=AUDIO_TOLERANCE)
    if not parts:
        return
    assert "".join(part.text or "" for part in parts) == (found.text or ""), "words twice, or missing"
    pieces = [piece for part in parts for piece in part.audios]
    if calm.audios:
        starts = np.cumsum([0, *(piece.samples.shape[1] for piece in pieces)])
        assert [piece.start for piece in pieces] == list(starts[:-1]), "samples twice, or missing"
        heard = np.concatenate([piece.samples for piece in pieces], axis=1)
        np.testing.assert_allclose(heard, calm.audios[0].samples, atol=AUDIO_TOLERANCE)
