"""Pixels to latents as the FLUX.2 transformer has them, and back: diffusers' AutoencoderKLFlux2, two by two of its
latents folded into the channels of one, and these normalised by the statistics that it was published with.

Legend: C channels of the transformer's latents, h, w their sides, H, W sides in pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_omni.worker.diffusion.patches import patchified, unpatchified


class Flux2Autoencoder:
    """vae: AutoencoderKLFlux2, on its device."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self._mean = vae.bn.running_mean.float()[:, None, None]
        self._deviation = (vae.bn.running_var.float() + vae.config.batch_norm_eps).sqrt()[:, None, None]

    def encode(self, pixels: Tensor) -> Tensor:
        """uint8 [H, W, 3] -> the most likely latents [C, h, w], float32."""
        scaled = (pixels.permute(2, 0, 1)[None].float() / 127.5 - 1).to(device=self.vae.device, dtype=self.vae.dtype)
        latents = self.vae.encode(scaled.contiguous(memory_format=torch.channels_last)).latent_dist.mode()
        patches = patchified(latents, channels_first=True)[0].T  # [C, h * w]
        folded = patches.unflatten(1, (latents.shape[2] // 2, -1))
        return (folded.float() - self._mean) / self._deviation

    def decode(self, latents: Tensor) -> Tensor:
        """[C, h, w] float32 -> [3, H, W] float32, 0 to 1 being what can be shown."""
        return self.decode_unfolded(self.unfold(latents))

    def unfold(self, latents: Tensor) -> Tensor:
        """[C, h, w] float32 -> [C / 4, 2 h, 2 w] float32, the autoencoder's own."""
        height, width = latents.shape[1:]
        patches = (latents * self._deviation + self._mean).flatten(1).T
        return unpatchified(patches[None], height, width, channels_first=True)[0]

    def decode_unfolded(self, latents: Tensor) -> Tensor:
        """What `unfold` gives -> [3, H, W] float32, 0 to 1 being what can be shown."""
        scaled = latents[None].to(self.vae.dtype).contiguous(memory_format=torch.channels_last)
        return self.vae.decode(scaled).sample[0].float() / 2 + 0.5
