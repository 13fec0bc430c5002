"""The tiny folders that the qwen-tts package answered for are the same here: weights by formula, ids by tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from support.qwen3_tts import answers, cases, spread, write_folder
from support.qwen3_tts_configs import TASKS
from transformers import AutoTokenizer

ANSWERS = answers()


def test_weights_are_the_same_numbers_on_every_machine() -> None:
    """Written down where the answers were made."""
    expected = [-0.12320363521575928, 0.00787341594696045, -0.49591851234436035, -0.47734153270721436]
    np.testing.assert_array_equal(spread("talker.model.norm.weight", [4]), np.float32(expected))


@pytest.mark.parametrize("task", TASKS)
def test_a_tokenizer_here_makes_the_ids_of_the_package(task: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, task)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for case in cases().values():
        if case.task != task:
            continue
        said = f"<|im_start|>assistant\n{case.text}<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer(said).input_ids == ANSWERS[f"{case.name}.input_ids"].tolist()
        if case.instruct:
            instructed = f"<|im_start|>user\n{case.instruct}<|im_end|>\n"
            assert tokenizer(instructed).input_ids == ANSWERS[f"{case.name}.instruct_ids"].tolist()
        if case.ref_text:
            referred = f"<|im_start|>assistant\n{case.ref_text}<|im_end|>\n"
            assert tokenizer(referred).input_ids == ANSWERS[f"{case.name}.ref_ids"].tolist()
    with safe_open(folder / "model.safetensors", "numpy") as file:
        has_encoder = any(name.startswith("speaker_encoder.") for name in file.keys())  # noqa: SIM118  no mapping
    assert has_encoder == (task == "base")
