"""The seed that was drawn is told, and makes the same again: pictures, sounds, words, and all stages of one request."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from support.toy_stage import register_toys

from vllm_omni import DiffusionParams, Omni, SamplingParams
from vllm_omni.params import MAX_SEED

register_toys()
WRITER = {
    "name": "writer",
    "stages": {
        "writer": {
            "kind": "ar",
            "model": "asset://tiny-image/text_encoder",
            "task": "generate",
            "tokenizer": "asset://tiny-image/tokenizer",
        }
    },
    "outputs": ["writer"],
}
WORDS = SamplingParams(temperature=2.0, max_tokens=12, ignore_eos=True)


def test_a_drawn_seed_makes_the_same_pictures_again_and_each_alone() -> None:
    with Omni("tiny_image", progress=False) as omni:
        steps = {"num_inference_steps": 2}
        first, second = omni.generate(["a red circle"] * 2, DiffusionParams(num_outputs=2, **steps))
        assert first.seed is not None and first.seed != second.seed
        assert first.metrics["image"]["seed"] == first.seed and "seed" not in first.metrics["text"]
        assert first.params["image"].seed == first.seed  # type: ignore[attr-defined]
        (again,) = omni.generate("a red circle", DiffusionParams(seed=first.seed, num_outputs=2, **steps))
        (alone,) = omni.generate("a red circle", DiffusionParams(seed=first.seed + 1, **steps))
    pixels = [np.asarray(image) for image in (*first.images, *again.images, *alone.images)]
    assert np.array_equal(pixels[0], pixels[2]) and np.array_equal(pixels[1], pixels[3])
    assert np.array_equal(pixels[1], pixels[4]) and not np.array_equal(pixels[0], pixels[1])
    assert again.seed == first.seed


def test_a_drawn_seed_makes_the_same_words_again() -> None:
    with Omni(WRITER, progress=False) as omni:
        first, second = omni.generate(["paint a crimson ball"] * 2, dataclasses.replace(WORDS, n=2))
        assert first.seed is not None and first.token_ids != second.token_ids
        (again,) = omni.generate("paint a crimson ball", dataclasses.replace(WORDS, n=2, seed=first.seed))
        (alone,) = omni.generate("paint a crimson ball", dataclasses.replace(WORDS, seed=first.seed + 1))
        (greedy,) = omni.generate("paint a crimson ball", SamplingParams(temperature=0.0))
        (last,) = omni.generate("paint a crimson ball", dataclasses.replace(WORDS, n=2, seed=MAX_SEED))
        (zero,) = omni.generate("paint a crimson ball", dataclasses.replace(WORDS, seed=0))
    assert [each.token_ids for each in first.completions] == [each.token_ids for each in again.completions]
    assert first.completions[1].token_ids == alone.token_ids
    assert greedy.seed is None, "nothing was drawn"
    assert last.completions[1].token_ids == zero.token_ids and last.seed == MAX_SEED


def test_one_number_makes_a_request_of_several_stages_again() -> None:
    params = {"writer": WORDS, "image": DiffusionParams(num_inference_steps=1)}
    with Omni("tiny_scene", progress=False) as omni:
        (first,) = omni.generate("paint a crimson ball", params)
        drawn = {stage: metrics["seed"] for stage, metrics in first.metrics.items() if "seed" in metrics}
        assert len(drawn) > 1 and set(drawn.values()) == {first.seed}
        # a seed that one stage is given is that of the others too
        some = {**params, "image": DiffusionParams(num_inference_steps=1, seed=first.seed)}
        (again,) = omni.generate("paint a crimson ball", some)
    assert again.text == first.text and np.array_equal(np.asarray(again.images[0]), np.asarray(first.images[0]))


@pytest.mark.parametrize("seed", [0, 1, MAX_SEED])
def test_a_given_seed_is_told_as_it_was_given(seed: int) -> None:
    with Omni("tiny_image", progress=False) as omni:
        (output,) = omni.generate("a red circle", DiffusionParams(seed=seed, num_inference_steps=1))
    assert output.seed == seed
