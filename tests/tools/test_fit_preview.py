"""The tool that fits preview maps: the shipped one is its own, and any VAE with any pictures gets one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.dit import random_pipeline, spec

from tools import fit_preview
from vllm_omni.utils.files import assets_folder, read_json
from vllm_omni.worker.diffusion.preview_map import PREVIEW_FILE, PreviewMap

SHIPPED = assets_folder() / "tiny-image" / "vae"


def test_the_shipped_map_is_what_the_tool_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fitted again from fewer pictures: the same colours, not the same digits."""
    fit_preview.main(["asset://tiny-image", "--count", "60", "-o", str(tmp_path / PREVIEW_FILE)])
    assert "explains 9" in capsys.readouterr().out
    shipped = PreviewMap.of_vae(SHIPPED)
    found = PreviewMap.from_dict(read_json(tmp_path / PREVIEW_FILE), 16, "here")
    assert shipped is not None and len(shipped.products) == len(found.products) == 136
    latents = torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(0))
    one, other = (fit_preview.Colours(each, torch.device("cpu"))(latents) for each in (shipped, found))
    assert (one - other).abs().mean() < 0.5 * (one - one.mean()).abs().mean()


def test_least_squares_find_a_map_that_is_there() -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(500, 3, generator=generator)
    products = torch.stack([latents[:, i] * latents[:, j] for i in range(3) for j in range(i, 3)], dim=1)
    factors, weights = torch.randn(3, 3, generator=generator), torch.randn(6, 3, generator=generator)
    found = fit_preview.fit(latents, 0.25 + latents @ factors + products @ weights)
    np.testing.assert_allclose(found.factors, factors.numpy(), atol=1e-4)
    np.testing.assert_allclose(found.products, weights.numpy(), atol=1e-4)
    np.testing.assert_allclose(found.bias, [0.25] * 3, atol=1e-4)


def test_ones_own_pictures_of_any_size_give_a_map_that_is_read_at_the_next_load(tmp_path: Path) -> None:
    random_pipeline(tmp_path / "model")
    assert spec(tmp_path / "model").model.preview_map is None  # type: ignore[attr-defined]
    rng = np.random.default_rng(0)
    (tmp_path / "pictures" / "deep").mkdir(parents=True)
    for number, (height, width) in enumerate([(64, 64), (50, 90), (200, 70), (33, 33), (120, 64), (7, 7)]):
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / ("deep" if number % 2 else ".") / f"{number}.png")
    fit_preview.main([str(tmp_path / "model"), "--pictures", str(tmp_path / "pictures"), "--size", "128"])
    found = spec(tmp_path / "model").model.preview_map  # type: ignore[attr-defined]
    assert found is not None and found == PreviewMap.of_vae(tmp_path / "model" / "vae")


def test_too_few_pictures_and_folders_without_a_vae_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match=f"^{tmp_path}: "):
        fit_preview.main([str(tmp_path)])
    random_pipeline(tmp_path / "model")
    Image.new("RGB", (64, 64)).save(tmp_path / "one.png")
    with pytest.raises(SystemExit, match="--pictures: got 1, expected at least 5"):
        fit_preview.main([str(tmp_path / "model"), "--pictures", str(tmp_path)])
    assert not (tmp_path / "model" / "vae" / PREVIEW_FILE).exists()
