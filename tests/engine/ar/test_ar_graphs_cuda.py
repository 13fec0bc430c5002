"""On a GPU: texts that are drawn in captured steps, begun ahead, are those of plain steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.ar import make_model_folder

from vllm_omni import Omni, SamplingParams

pytestmark = pytest.mark.cuda
DRAWS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.6},
    {"temperature": 0.9, "top_k": 12, "top_p": 0.9},
    {"temperature": 1.1, "top_p": 0.8, "min_p": 0.01},
]


def test_captured_draws_are_those_of_plain_steps(tmp_path: Path, gpu: torch.device) -> None:
    folder = str(make_model_folder(tmp_path))
    params = [SamplingParams(seed=3, max_tokens=20, ignore_eos=True, **draw) for draw in DRAWS]
    texts = []
    for key in ("text.cuda_graphs=null", "text.cuda_graphs=false"):
        overrides = ["text.dtype=float32", "text.max_num_seqs=4", key]
        with Omni(model=folder, device=str(gpu), overrides=overrides, progress=False) as omni:
            texts.append([output.token_ids for output in omni.generate(["a red circle"] * 4, params)])
    assert texts[0] == texts[1]
