"""The VAE of a stage in float16 computes in float32 where its configuration says so; bfloat16 has the range."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.diffusers_folders import random_z_image

from vllm_omni.models.z_image.spec import ZImageSpec

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("upcasts", "dtype", "expected"),
    [
        (True, torch.float16, torch.float32),
        (None, torch.float16, torch.float32),  # as diffusers takes it
        (False, torch.float16, torch.float16),
        (True, torch.bfloat16, torch.bfloat16),
        (True, torch.float32, torch.float32),
    ],
)
def test_a_vae_that_asks_for_it_is_not_in_float16(
    tmp_path: Path, upcasts: bool | None, dtype: torch.dtype, expected: torch.dtype
) -> None:
    random_z_image(tmp_path)
    file = tmp_path / "vae" / "config.json"
    config = {key: value for key, value in json.loads(file.read_text()).items() if key != "force_upcast"}
    file.write_text(json.dumps(config if upcasts is None else {**config, "force_upcast": upcasts}))
    spec = ZImageSpec(tmp_path)
    pipeline = spec.load(CPU, dtype)
    assert pipeline.vae.dtype == expected
    assert pipeline.transformer.x_pad_token.dtype == dtype
    parts = (pipeline.transformer, pipeline.vae)
    held = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
    assert spec.weights_bytes(dtype) == pytest.approx(held, rel=0.05)
