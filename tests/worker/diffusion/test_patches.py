"""Latents to patches and back, in both orders of what is within a patch."""

from __future__ import annotations

import pytest
import torch

from vllm_omni.worker.diffusion.patches import dense, patchified, unpatchified


@pytest.mark.parametrize("channels_first", [False, True])
def test_patches_become_the_same_latents_again(channels_first: bool) -> None:
    latents = torch.randn(3, 5, 4, 6)
    patches = patchified(latents, channels_first=channels_first)
    assert patches.shape == (3, 6, 20)
    assert torch.equal(unpatchified(patches, 2, 3, channels_first=channels_first), latents)


def test_a_patch_holds_its_square_in_the_order_that_is_asked_for() -> None:
    latents = torch.arange(2 * 4 * 4).view(1, 2, 4, 4)
    square = latents[0, :, 2:, :2]  # the third patch, row by row
    assert torch.equal(patchified(latents)[0, 2], square.permute(1, 2, 0).flatten())
    assert torch.equal(patchified(latents, channels_first=True)[0, 2], square.flatten())


def test_rows_are_stacked_as_chosen() -> None:
    rows = [torch.full((2,), float(value)) for value in range(4)]
    assert torch.equal(dense(rows, [2, 0]), torch.tensor([[2.0, 2.0], [0.0, 0.0]]))
    whole = torch.stack(rows)
    assert dense(whole, range(4)) is whole
    assert torch.equal(dense(whole, [3]), torch.tensor([[3.0, 3.0]]))
