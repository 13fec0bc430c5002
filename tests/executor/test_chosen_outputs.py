"""A request that wants some of the config's outputs: the others are not computed, and what is wanted is the same."""

from __future__ import annotations

import pytest

from vllm_omni import Omni, SamplingParams
from vllm_omni.errors import InvalidRequestError
from vllm_omni.request import OmniRequest, RequestStatus

PROMPT = "show me a scarlet ball and play a C4 on a string"


@pytest.fixture(scope="module")
def omni() -> Omni:
    return Omni("tiny_omni", progress=False)


def test_other_outputs_are_not_computed(omni: Omni) -> None:
    whole = omni.generate(PROMPT)[0]
    words = omni.generate({"prompt": PROMPT, "outputs": ["thinker"]})[0]
    assert words.text == whole.text
    assert set(words.metrics) == set(words.results) == {"thinker"}
    assert set(whole.results) == {"thinker", "image", "sound"}


def test_a_wanted_output_is_the_same_alone(omni: Omni) -> None:
    params = {"thinker": SamplingParams(temperature=0)}
    seeded = {"image": _seed(3)}
    whole = omni.generate(PROMPT, {**params, **seeded})[0]
    alone = omni.generate({"prompt": PROMPT, "outputs": ["image"]}, {**params, **seeded})[0]
    assert set(alone.results) == {"image"}
    assert "sound" not in alone.metrics
    assert alone.images[0].tobytes() == whole.images[0].tobytes()


def test_a_stream_shows_wanted_outputs_alone(omni: Omni) -> None:
    parts = list(omni.stream({"prompt": PROMPT, "outputs": ["image"]}))
    assert {stage for part in parts for stage in part.results} == {"image"}
    assert parts[-1].status is RequestStatus.FINISHED


def test_parameters_of_an_output_that_is_not_wanted_are_refused(omni: Omni) -> None:
    output = omni.generate({"prompt": PROMPT, "outputs": ["thinker"]}, {"image": _seed(3)})[0]
    assert output.status is RequestStatus.REJECTED
    assert "does not run for this request" in str(output.error)


def test_an_unknown_output_is_refused_by_name(omni: Omni) -> None:
    output = omni.generate({"prompt": PROMPT, "outputs": ["thinkr"]})[0]
    assert output.status is RequestStatus.REJECTED
    assert "did you mean 'thinker'" in str(output.error)


@pytest.mark.parametrize("outputs", [[], [1], "image", {"image": 1}, [None]])
def test_outputs_are_a_list_of_names(outputs: object) -> None:
    with pytest.raises(InvalidRequestError, match="outputs: got"):
        OmniRequest(prompt="x", outputs=outputs)  # type: ignore[arg-type]


def _seed(seed: int) -> object:
    from vllm_omni import DiffusionParams

    return DiffusionParams(seed=seed)
