"""The talker and its code predictor against what the qwen-tts package answered: prompts, logits, and greedy frames."""

from __future__ import annotations

import pytest
import torch
from support.qwen3_tts import Case, answers, cases, write_folder
from support.qwen3_tts_configs import TASKS
from support.talkers import Talkers
from torch import Tensor

ANSWERS = answers()
CASES = cases()
FRAMES = 8


@pytest.fixture(scope="module")
def talkers(tmp_path_factory: pytest.TempPathFactory) -> Talkers:
    return Talkers({task: write_folder(tmp_path_factory.mktemp(task), task) for task in TASKS})


def answer(case: Case, name: str) -> Tensor:
    return torch.from_numpy(ANSWERS[f"{case.name}.{name}"])


@pytest.mark.parametrize("name", CASES)
def test_the_prompt_and_the_rows_behind_it_are_the_packages(talkers: Talkers, name: str) -> None:
    case = CASES[name]
    inputs = talkers.inputs(case)
    prompt, trailing = answer(case, "prompt"), answer(case, "trailing")
    ours = inputs.between(0, len(prompt)).rows
    assert ours is not None and not ours.is_added.any() and inputs.num_ready_tokens is None
    torch.testing.assert_close(ours.rows, prompt, rtol=1e-5, atol=1e-5)
    count = len(prompt) + len(trailing)
    behind = inputs.between(len(prompt), count).rows
    assert behind is not None and behind.is_added.all()
    torch.testing.assert_close(behind.rows, trailing, rtol=1e-5, atol=1e-5)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(ours.rows[1:], prompt[:-1], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", CASES)
def test_greedy_frames_and_their_logits_are_the_packages(talkers: Talkers, name: str) -> None:
    case = CASES[name]
    codes, logits, residual = talkers.speak(case, FRAMES)
    torch.testing.assert_close(codes, answer(case, "codes"), rtol=0, atol=0)
    expected = answer(case, "logits")[: len(logits)]
    shown = logits[: len(expected), : expected.shape[1]]
    torch.testing.assert_close(shown, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(residual, answer(case, "residual_logits"), rtol=1e-4, atol=1e-4)
