"""Whole pipelines under every executor: words, pictures, sounds, streams, errors and ends are those of one process.

One graph of everything is loaded four times: all in this process, its stages in processes, all of them in one other,
some of them on Ray.
"""

from __future__ import annotations

import dataclasses
import io
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.belongings import descendants
from support.everywhere import APART, SCENE, SPEECH, TUNE, content, everywhere_config, told

from vllm_omni import DiffusionParams, Omni, OmniOutput, RequestStatus, SamplingParams
from vllm_omni.errors import RequestTimeoutError
from vllm_omni.lora import LoRA

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = "a violet star above a golden ring"
FEW = DiffusionParams(seed=3, num_inference_steps=3)
SPOKEN = {"token2wav": DiffusionParams(seed=1)}
ON_RAY = ("image", "talker", "token2wav")
LONG = DiffusionParams(num_inference_steps=900)
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (192, 192, 3), dtype=np.uint8))
FILE = io.BytesIO()
PICTURE.save(FILE, format="PNG")
TORN = FILE.getvalue()[:5000]


def soon(holds: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    """Whether something comes true in time."""
    until = time.monotonic() + timeout_s
    while not (found := holds()) and time.monotonic() < until:
        time.sleep(0.05)
    return found


def scene(**more: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "outputs": SCENE, **more}


def spoken(words: str = "two red") -> dict[str, Any]:
    return {"prompt": f"can you read out: {words}?", "outputs": SPEECH}


def tune(words: str) -> dict[str, Any]:
    return {"prompt": words, "outputs": TUNE}


def changed(**changes: Any) -> DiffusionParams:
    return dataclasses.replace(FEW, **changes)


def written(**sampling: Any) -> dict[str, Any]:
    return {"writer": SamplingParams(**sampling), "image": FEW}


ANSWERED: dict[str, tuple[dict[str, Any], Any]] = {
    "words and a picture": (scene(), FEW),
    "guided, two pictures": (scene(negative_prompt="blue"), changed(guidance_scale=3.0, num_outputs=2)),
    "words that are drawn": (scene(), written(temperature=0.9, seed=11, logprobs=2)),
    "three texts": (
        {"prompt": PROMPT, "outputs": ("teller",)},
        SamplingParams(n=3, temperature=1.5, seed=5, logprobs=1, max_tokens=12),
    ),
    "a stop string": (scene(outputs=("writer",)), SamplingParams(stop=["star"], max_tokens=20)),
    "an adapter": (scene(), changed(lora=[LoRA("outlines", scale=0.8)])),
    "tensors": (scene(outputs=("writer.hidden_states", "image.latents")), FEW),
    "previews": (scene(), changed(num_previews=2)),
    "a picture that is changed": (scene(image=PICTURE), changed(strength=0.5, num_inference_steps=4)),
    "speech": (spoken(), SPOKEN),
    "a tune": (tune("play a C4 on a string"), {"sound": DiffusionParams(seed=2, num_inference_steps=2)}),
    "nothing to play": (tune("hello"), None),
    # and what is refused, or fails on its way
    "too many texts": ({"prompt": PROMPT, "outputs": ("teller",)}, SamplingParams(n=10**4)),
    "too long a prompt": (scene(prompt="red " * 3000), FEW),
    "a parameter of no stage": (scene(outputs=("writer",)), FEW),
    "an adapter that is not there": (scene(), changed(lora=[LoRA("outlined")])),
    "too many steps": (scene(), changed(num_inference_steps=10**5)),
    "an odd size": (scene(), changed(height=100, width=8)),
    "no picture": (scene(image=b"no picture"), changed(strength=0.5)),
    "a torn picture": (scene(image=TORN), changed(strength=0.5)),
    "no such token": (scene(prompt=[5, 10**6]), FEW),
}
# of Ray a part, since it carries what processes send each other
ON_RAY_TOO = ("words and a picture", "an adapter", "previews", "a picture that is changed", "speech", "a torn picture")


class Inline:
    """All stages in this process. What a case comes to is looked up once it is known."""

    def __init__(self, omni: Omni) -> None:
        self.omni = omni
        self._known: dict[str, list[OmniOutput]] = {}

    def result(self, name: str) -> list[Any]:
        return told(self._parts(name))

    def final(self, name: str) -> OmniOutput:
        return self._parts(name)[-1]

    def _parts(self, name: str) -> list[OmniOutput]:
        if name not in self._known:
            self._known[name] = list(self.omni.stream(*ANSWERED[name]))
        return self._known[name]


@pytest.fixture(scope="module")
def inline() -> Iterator[Inline]:
    with Omni(everywhere_config(), progress=False, dtype="float32", device="cpu") as omni:
        yield Inline(omni)


@pytest.fixture(scope="module")
def processes() -> Iterator[Omni]:
    apart = [f"{name}.executor=process" for name in APART]
    with Omni(everywhere_config(), progress=False, dtype="float32", device="cpu", overrides=apart) as omni:
        yield omni


@pytest.fixture(scope="module")
def together() -> Iterator[Omni]:
    apart = ["executor=process", "process=models"]
    with Omni(everywhere_config(), progress=False, dtype="float32", device="cpu", overrides=apart) as omni:
        assert len({stage["pid"] for stage in omni.get_status()["stages"].values()}) == 1
        yield omni


@pytest.fixture(scope="module")
def ray(ray_settings: None) -> Iterator[Omni]:
    """A Ray that is started for this, and ended."""
    if find_spec("ray") is None:
        pytest.skip("needs ray")
    before = descendants(os.getpid())
    apart = ["ray.address=local", *(f"{name}.executor=ray" for name in ON_RAY)]
    apart += [f"{name}.ray.num_cpus=0.25" for name in ON_RAY]
    with Omni(everywhere_config(), progress=False, dtype="float32", device="cpu", overrides=apart) as omni:
        assert len({stage.get("pid") for stage in omni.get_status()["stages"].values()}) == len(ON_RAY) + 1
        yield omni
    import ray

    assert not ray.is_initialized()
    until = time.monotonic() + 10
    while descendants(os.getpid()) - before:
        assert time.monotonic() < until, "Ray has left processes behind"
        time.sleep(0.05)


@pytest.fixture(scope="module", params=["processes", "together", "ray"])
def apart(request: pytest.FixtureRequest) -> Omni:
    omni: Omni = request.getfixturevalue(request.param)
    return omni


@pytest.mark.parametrize(
    ("apart", "name"),
    [
        *((where, name) for where in ("processes", "together") for name in ANSWERED),
        *(("ray", name) for name in ON_RAY_TOO),
    ],
    indirect=["apart"],
)
def test_a_request_is_answered_or_refused_as_in_one_process(apart: Omni, name: str, inline: Inline) -> None:
    found, expected = told(list(apart.stream(*ANSWERED[name]))), inline.result(name)
    for one, other in zip(found, expected, strict=True):
        assert one == other


@pytest.mark.parametrize("form", ["file", "array"])
def test_a_picture_is_the_same_however_it_comes(form: str, processes: Omni, inline: Inline) -> None:
    prompt, params = ANSWERED["a picture that is changed"]
    given = FILE.getvalue() if form == "file" else np.asarray(PICTURE)
    (output,) = processes.generate({**prompt, "image": given}, params)
    assert content(output)["images"] == inline.result("a picture that is changed")[-1]["images"]


def test_several_requests_at_once_stay_apart(apart: Omni, inline: Inline) -> None:
    names = ["speech", "words and a picture", "a picture that is changed", "an adapter"]
    prompts, params = zip(*(ANSWERED[name] for name in names), strict=True)
    for name, found in zip(names, apart.generate(list(prompts), list(params)), strict=True):
        expected = inline.final(name)
        assert found.error is None and (found.text, found.token_ids) == (expected.text, expected.token_ids)
        for ours, theirs in zip(found.images, expected.images, strict=True):
            difference = np.asarray(ours, np.int16) - np.asarray(theirs, np.int16)
            assert abs(difference).max() <= 1, "only by how sums of a batch round"
        for ours, theirs in zip(found.audios, expected.audios, strict=True):
            assert np.abs(ours.samples - theirs.samples).max() < 1e-4


def test_deadlines_and_aborts_end_a_request_and_free_what_it_held(apart: Omni) -> None:
    late = apart.generate(scene(timeout_s=0.5), LONG)[0]
    assert late.status is RequestStatus.FAILED and isinstance(late.error, RequestTimeoutError)
    assert "was not done within 0.5 s (it was in" in str(late.error)
    with closing(apart.stream(scene(), LONG)) as parts:
        next(parts)
    assert soon(lambda: is_free(apart.get_metrics()["stages"]))


def is_free(stages: Mapping[str, Any]) -> bool:
    """Of what these tell; one that does not answer at once tells what it did the last time."""
    image, writer = stages["image"], stages["writer"]
    return (
        image.get("running") == 0
        and image["step_cache_used_bytes"] == 0
        and writer.get("num_blocks") is not None
        and writer["num_free_blocks"] == writer["num_blocks"]
    )


def test_a_picture_that_is_stopped_goes_on_under_another_executor(apart: Omni, inline: Inline, tmp_path: Path) -> None:
    params = DiffusionParams(seed=7, num_inference_steps=6)
    (whole,) = inline.omni.generate(scene(), params)
    for number, (saver, other) in enumerate([(inline.omni, apart), (apart, inline.omni)]):
        path = tmp_path / f"{number}.safetensors"
        with closing(saver.stream(scene(), params)) as parts:
            for part in parts:
                if "image" in part.progress and part.progress["image"].step >= 2 and not path.exists():
                    saver.save_state(part.request_id, path)
                    break
        resumed = other.resume(path)
        assert resumed.error is None
        assert np.asarray(resumed.images[0]).tobytes() == np.asarray(whole.images[0]).tobytes()


def test_edges_count_what_crosses_them_alike(processes: Omni, inline: Inline) -> None:
    def crossed(omni: Omni) -> Any:
        before = omni.get_metrics()["edges"]
        omni.generate([scene()], FEW)
        after = omni.get_metrics()["edges"]
        return {edge: {key: after[edge][key] - before[edge][key] for key in after[edge]} for edge in after}

    assert crossed(processes) == crossed(inline.omni)


def test_stages_that_share_a_process_share_their_weights(together: Omni, inline: Inline) -> None:
    found, expected = together.get_metrics(), inline.omni.get_metrics()
    assert found["num_models"] == expected["num_models"]
    assert found["memory"]["planned_bytes"] == expected["memory"]["planned_bytes"]


def test_what_reads_prompts_is_there_before_the_first_request(together: Omni) -> None:
    """Its engine, which reads them too, is elsewhere; nobody is to wait for a tokenizer."""
    specs = together._executor.pipeline.specs
    assert "_processor" in vars(specs["writer"]) and "_processor" not in vars(specs["talker"])


def test_models_of_all_processes_are_counted(processes: Omni, inline: Inline) -> None:
    """In one process the writer shares its weights; they are in two of those apart, and in the loop's."""
    assert processes.get_metrics()["num_models"] == inline.omni.get_metrics()["num_models"] + 2 == 9
