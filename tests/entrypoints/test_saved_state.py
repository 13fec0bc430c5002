"""A picture that is stopped after any step and goes on in another process is, to the bit, what it would have been."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.programs import run_program

from vllm_omni import AsyncOmni, DiffusionParams, Omni, OmniOutput, SamplingParams, read_state
from vllm_omni.entrypoints.state_file import KIND
from vllm_omni.errors import InvalidRequestError, SchedulerError
from vllm_omni.request import RequestStatus
from vllm_omni.utils.tensor_document import read_document, write_document

PROMPT = "a red circle left of a blue square"
STEPS = 8
PLAIN = DiffusionParams(seed=7, num_inference_steps=STEPS)
# step caches with what each needs to reuse steps of a picture of eight
KEYS: Mapping[str, Mapping[str, Any]] = {
    "first_block": {"threshold": 0.3},
    "dbcache": {"threshold": 0.3, "max_skips": 2},
    "taylorseer": {"interval": 3},
}
CASES: dict[str, tuple[str, DiffusionParams]] = {
    "plain": ("none", PLAIN),
    "guided": ("none", dataclasses.replace(PLAIN, guidance_scale=3.0, negative_prompt="blue")),
    "three": ("none", dataclasses.replace(PLAIN, num_outputs=3, height=64, width=96)),
    **{policy: (policy, dataclasses.replace(PLAIN, guidance_scale=2.0)) for policy in KEYS},
}
RESUME = """
import json, sys
import numpy as np
import torch
from vllm_omni import Omni
torch.set_num_threads(int(sys.argv[2]))
for folder, overrides in json.loads(sys.argv[1]):
    with Omni("tiny_image", overrides=overrides, progress=False) as omni:
        from pathlib import Path
        for file in sorted(Path(folder).glob("*.safetensors")):
            output = omni.resume(file)
            assert output.error is None, output.error
            np.save(file.with_suffix(".npy"), np.stack([np.asarray(image) for image in output.images]))
            file.with_suffix(".json").write_text(json.dumps(dict(output.metrics["image"])))
"""


def overrides(policy: str) -> list[str]:
    return [f"image.cache={json.dumps({'policy': policy, **KEYS[policy]})}"] if policy != "none" else []


def steps_of(params: DiffusionParams) -> range:
    """After which a state can be saved: behind the last one a single picture is decoded at once, of several one."""
    return range(1, STEPS if params.num_outputs is None else STEPS + 1)


def pixels(output: OmniOutput) -> np.ndarray:
    assert output.error is None, output.error
    return np.stack([np.asarray(image) for image in output.images])


def save_after(omni: Omni, path: Path, params: DiffusionParams, num_steps: int, prompt: Any = PROMPT) -> None:
    """Stops a request after so many steps of every output; its state is in the file then."""
    with closing(omni.stream(prompt, params)) as parts:
        for part in parts:
            assert not part.finished, part.error
            done = part.progress.get("image")
            if done is not None and done.step == num_steps * (params.num_outputs or 1):
                omni.save_state(part.request_id, path)
                return


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By case: what a whole run gives, a state after each step, and what a fresh process makes of that."""
    root = tmp_path_factory.mktemp("states")
    for case, (policy, params) in CASES.items():
        with Omni("tiny_image", overrides=overrides(policy), progress=False) as omni:
            (whole,) = omni.generate(PROMPT, params)
            (root / case).mkdir()
            np.save(root / case / "whole.npy", pixels(whole))
            (root / case / "whole.json").write_text(json.dumps(dict(whole.metrics["image"])))
            for step in steps_of(params):
                save_after(omni, root / case / f"{step}.safetensors", params, step)
    work = json.dumps([(str(root / case), overrides(policy)) for case, (policy, _) in CASES.items()])
    threads = str(torch.get_num_threads())  # with another number sums round otherwise
    done = run_program("-c", RESUME, work, threads, timeout_s=160)
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture(scope="module")
def omni() -> Iterator[Omni]:
    with Omni("tiny_image", progress=False) as loaded:
        yield loaded


@pytest.fixture
def state(omni: Omni, tmp_path: Path) -> Path:
    path = tmp_path / "state.safetensors"
    save_after(omni, path, PLAIN, 3)
    return path


@pytest.mark.parametrize("case", CASES)
def test_it_goes_on_from_every_step_to_the_same_picture(folder: Path, case: str) -> None:
    whole = np.load(folder / case / "whole.npy")
    for step in steps_of(CASES[case][1]):
        assert np.array_equal(np.load(folder / case / f"{step}.npy"), whole), step


@pytest.mark.parametrize("case", CASES)
def test_metrics_are_of_the_whole_run_and_say_what_was_done_before(folder: Path, case: str) -> None:
    whole = json.loads((folder / case / "whole.json").read_text())
    num_outputs = CASES[case][1].num_outputs or 1
    assert "resumed_steps" not in whole
    for step in steps_of(CASES[case][1]):
        again = json.loads((folder / case / f"{step}.json").read_text())
        assert {name: again[name] for name in ("steps", "cache_hits", "seed")} == {
            name: whole[name] for name in ("steps", "cache_hits", "seed")
        }
        assert again["resumed_steps"] == step * num_outputs


@pytest.mark.parametrize("policy", KEYS)
def test_the_cached_cases_reuse_steps(folder: Path, policy: str) -> None:
    assert json.loads((folder / policy / "whole.json").read_text())["cache_hits"] > 0


def test_progress_goes_on_where_it_was_and_the_text_encoder_rests(omni: Omni, state: Path) -> None:
    *parts, final = omni.stream(read_state(state))
    assert [part.progress["image"].step for part in parts] == list(range(4, STEPS + 1))
    assert {part.progress["image"].num_steps for part in parts} == {STEPS}
    assert set(final.metrics) == {"image"} and final.params["image"].seed == 7


def test_one_that_was_saved_goes_on_itself_and_may_be_saved_again(omni: Omni, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    for part in omni.stream(PROMPT, PLAIN):
        if not part.finished and part.progress["image"].step < STEPS:
            omni.save_state(part.request_id, path)
    again = omni.resume(path)
    assert np.array_equal(pixels(part), pixels(again))
    assert again.metrics["image"]["resumed_steps"] == STEPS - 1


def test_a_state_that_was_resumed_can_be_saved_later_on(omni: Omni, state: Path, tmp_path: Path) -> None:
    (whole,) = omni.generate(PROMPT, PLAIN)
    with closing(omni.stream(read_state(state))) as parts:
        for part in parts:
            if part.progress["image"].step == 6:
                omni.save_state(part.request_id, tmp_path / "later.safetensors")
                break
    later = omni.resume(tmp_path / "later.safetensors")
    assert np.array_equal(pixels(later), pixels(whole)) and later.metrics["image"]["resumed_steps"] == 6


def test_it_does_not_depend_on_its_batch_mates(omni: Omni, state: Path) -> None:
    (whole,) = omni.generate(PROMPT, PLAIN)
    other = DiffusionParams(seed=3, num_inference_steps=5, height=64, width=64)
    crowd = omni.generate([read_state(state), "a large pink star", "a green triangle"], [None, other, other])
    difference = pixels(crowd[0]).astype(int) - pixels(whole).astype(int)
    assert np.abs(difference).max() <= 1


def test_outputs_that_are_finished_are_kept_with_those_that_are_not(tmp_path: Path) -> None:
    """One sample at a time: the second is under way, the first is done."""
    params = dataclasses.replace(PLAIN, num_outputs=3, num_inference_steps=4)
    changes = ["image.max_batch_size=1", "image.max_batch_tokens=100000", "outputs=[image, image.latents]"]
    path = tmp_path / "state.safetensors"
    with Omni("tiny_image", overrides=changes, progress=False) as omni:
        (whole,) = omni.generate(PROMPT, params)
        with closing(omni.stream(PROMPT, params)) as parts:
            for part in parts:
                if "image" in part.progress and part.progress["image"].step == 6:
                    omni.save_state(part.request_id, path)
                    break
        kept = read_document(path, KIND)["stages"]["image"]["content"]
        assert kept["outputs"].keys() == {"0"} and kept["running"].keys() == {"1", "2"}
        again = omni.resume(path)
    assert np.array_equal(pixels(again), pixels(whole))
    assert (again.tensors["image.latents"] == whole.tensors["image.latents"]).all()
    assert again.metrics["image"]["steps"] == 12 and again.metrics["image"]["resumed_steps"] == 6


def test_async_omni_saves_between_two_steps_and_resumes(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"

    async def run(executor: str) -> tuple[OmniOutput, OmniOutput]:
        async with AsyncOmni("tiny_image", overrides=[f"image.executor={executor}"]) as omni:
            params = dataclasses.replace(PLAIN, num_inference_steps=40)
            whole = await omni.generate(PROMPT, params)
            async for part in omni.stream({"prompt": PROMPT, "request_id": "mine"}, params):
                if "image" in part.progress:
                    await omni.save_state("mine", path)
                    omni.abort("mine")
                    break
            with pytest.raises(InvalidRequestError, match="'gone'"):
                await omni.save_state("gone", path)
            return whole, await omni.resume(path)

    for executor in ("inline", "thread"):
        whole, again = asyncio.run(run(executor))
        assert np.array_equal(pixels(again), pixels(whole)) and again.metrics["image"]["resumed_steps"] > 0


def test_texts_that_are_asked_for_as_well_are_written_again(tmp_path: Path) -> None:
    """The thinker runs from its beginning, with the same seed; the picture goes on."""
    path = tmp_path / "state.safetensors"
    params = {"thinker": SamplingParams(temperature=0.5), "image": PLAIN}
    with Omni("tiny_omni", progress=False) as omni:
        prompt = {"prompt": "could you draw me a crimson ball", "outputs": list(omni.config.outputs)}
        (whole,) = omni.generate(prompt, params)
        with closing(omni.stream(prompt, params)) as parts:
            for part in parts:
                if "image" in part.progress and part.progress["image"].step == 4:
                    omni.save_state(part.request_id, path)
                    break
        again = omni.resume(path)
    assert again.text == whole.text and again.seed == whole.seed
    assert np.array_equal(pixels(again), pixels(whole))


@pytest.mark.parametrize("has_mask", [False, True])
def test_a_picture_that_starts_from_another_goes_on_without_its_file(tmp_path: Path, has_mask: bool) -> None:
    """What a request draws of the source before its noise, and what a mask keeps, are the same again."""
    path, params = tmp_path / "state.safetensors", dataclasses.replace(PLAIN, num_outputs=2)
    source = Image.effect_noise((128, 128), 80).convert("RGB")
    source.save(tmp_path / "source.png")
    prompt: dict[str, Any] = {"prompt": PROMPT, "image": tmp_path / "source.png", "strength": 0.7}
    if has_mask:
        prompt["mask"] = Image.linear_gradient("L").resize((128, 128))
    with Omni("tiny_image", overrides=["image.defaults={strength: 0.9}"], progress=False) as omni:
        (whole,) = omni.generate(prompt, params)
        save_after(omni, path, params, 3, prompt)
        (tmp_path / "source.png").unlink()
        again = omni.resume(path)
    assert np.array_equal(pixels(again), pixels(whole))
    assert whole.metrics["image"]["steps"] == again.metrics["image"]["steps"] < 2 * STEPS


def test_what_cannot_be_saved_is_said(omni: Omni, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"got 'x\.pt', expected a name that ends in \.safetensors"):
        omni.save_state("any", "x.pt")
    with pytest.raises(InvalidRequestError, match="'nobody', expected that of a request that runs"):
        omni.save_state("nobody", tmp_path / "x.safetensors")
    with closing(omni.stream(PROMPT, PLAIN)) as parts:
        first = next(parts)
        if "image" not in first.progress:
            with pytest.raises(InvalidRequestError, match="expected a denoising step of stage 'image'"):
                omni.save_state(first.request_id, tmp_path / "x.safetensors")
        for part in parts:
            if "image" in part.progress:
                with pytest.raises(InvalidRequestError, match="cannot be written"):
                    omni.save_state(part.request_id, "/proc/none/x.safetensors")
                break
    assert not list(tmp_path.iterdir())


def test_a_request_that_still_runs_keeps_its_id(omni: Omni, state: Path) -> None:
    request = read_state(state)
    with closing(omni.stream(request)) as parts:
        next(parts)
        assert isinstance(omni.resume(state).error, SchedulerError)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("image.cache={policy: taylorseer}", "cache: got {'policy': 'taylorseer'}, expected {'policy': 'none'}"),
        ("image.dtype=float16", "precision: got 'float16', expected "),
    ],
)
def test_another_config_is_refused_in_words(state: Path, change: str, words: str) -> None:
    with Omni("tiny_image", overrides=[change], progress=False) as omni:
        output = omni.resume(state)
    assert output.status is RequestStatus.REJECTED and isinstance(output.error, InvalidRequestError)
    assert words in str(output.error) and "overrides of the run that was saved" in str(output.error)


def test_another_checkpoint_is_refused_in_words(state: Path, tmp_path: Path) -> None:
    with Omni("tiny_audio", progress=False) as omni:
        error = omni.resume(state).error
    assert isinstance(error, InvalidRequestError) and "the saved stage 'image': got none here" in str(error)


def edited(state: Path, change: Any) -> Path:
    document = read_document(state, KIND)
    change(document)
    write_document(state, KIND, document)
    return state


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(version="0.0.1"), "got a state of vllm_omni '0.0.1', expected"),
        (lambda d: d.update(more=1), "got the keys"),
        (lambda d: d["params"]["image"].update(type="OmniConfig"), "got the type 'OmniConfig'"),
        (lambda d: d["params"]["image"]["set"].update(stepz=1), "stepz: unknown key"),
        (lambda d: d["params"]["image"]["set"].update(seed=-1), "seed"),
        (lambda d: d["request"].update(prompt=None), "prompt"),
        (lambda d: d.update(stages={}), "expected one to go on with"),
        (lambda d: d["stages"]["image"].pop("content"), "content"),
    ],
)
def test_a_file_that_was_changed_is_refused_as_it_is_read(state: Path, change: Any, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        read_state(edited(state, change))


def sample(document: Any) -> Any:
    return document["stages"]["image"]["content"]["running"]["0"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: sample(d).update(step=9), "step: got 9, expected at least 0 and at most 8"),
        (lambda d: sample(d).update(step=-1), "step: got -1"),
        (lambda d: sample(d).update(step=2.5), "step: got 2.5"),
        (lambda d: sample(d).update(num_reused=4), "num_reused: got 4"),
        (lambda d: sample(d).update(latents=sample(d)["latents"][:, 1:]), r"latents: got torch.float32 \[16, 15, 16\]"),
        (lambda d: sample(d).update(latents=sample(d)["latents"].half()), "latents: got torch.float16"),
        (lambda d: sample(d).update(generator=sample(d)["latents"]), "generator"),
        (lambda d: sample(d).update(generator=sample(d)["generator"] * 0 + 255), "generator"),
        (lambda d: sample(d)["trajectory"].update(_step_index=99), "step: got 99"),
        (lambda d: sample(d)["trajectory"].update(config=1), "config"),
        (lambda d: sample(d).update(caches={"positive": {}}), "caches: got the branch 'positive'"),
        (lambda d: d["stages"]["image"]["content"].update(running={}), "0 samples on their way"),
        (lambda d: d["stages"]["image"]["content"]["running"].update({"7": {}}), "expected outputs 0 to 0"),
        (lambda d: d["stages"]["image"]["content"].update(num_steps=-4), "num_steps"),
        (lambda d: d["stages"]["image"]["content"].update(inputs={}), "prompt_embeds"),
        (
            lambda d: d["stages"]["image"]["content"]["inputs"].update(prompt_embeds=sample(d)["latents"]),
            r"input 'prompt_embeds': got \[16, 16, 16\]",
        ),
    ],
)
def test_a_state_that_fits_nothing_fails_alone(omni: Omni, state: Path, change: Any, words: str) -> None:
    request = read_state(edited(state, change))
    spoilt, good = omni.generate([request, "a large pink star"], [None, PLAIN])
    assert spoilt.error is not None and good.error is None
    assert re.search(words, str(spoilt.error))


def test_pictures_of_a_request_are_in_its_file_as_pixels(omni: Omni, state: Path, tmp_path: Path) -> None:
    from vllm_omni.config.schema import LimitsConfig
    from vllm_omni.entrypoints.state_file import write_state

    picture = Image.new("RGBA", (5, 3), (200, 10, 30, 128))
    picture.save(tmp_path / "source.png")
    request = dataclasses.replace(
        read_state(state), fields={"image": str(tmp_path / "source.png"), "mask": [picture], "bpm": 90}
    )
    write_state(state, request, "tiny-image", LimitsConfig())
    (tmp_path / "source.png").unlink()
    fields = read_state(state).fields
    for found in (fields["image"], fields["mask"][0]):
        assert np.array_equal(np.asarray(found), np.asarray(picture))
    assert fields["bpm"] == 90
