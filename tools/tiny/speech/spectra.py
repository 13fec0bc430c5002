"""How far the short-time spectra of two sounds are from each other, as vocoders are trained to bring them together."""

from __future__ import annotations

import torch
from torch import Tensor

from tools.tiny.speech.mel import SAMPLE_RATE

STFT_SIZES = (128, 256, 512, 1024, 2048, 4096)
EXACT_SIZES = (256, 1024)
LOG_FLOOR = 3e-3
TURNING_WEIGHT = 2.0


def spectra(samples: Tensor, size: int) -> Tensor:
    """Complex [B, size / 2 + 1, frames]; noise of deviation one has the magnitude one or so everywhere."""
    window = torch.hann_window(size, device=samples.device)
    found = torch.stft(samples, size, size // 4, window=window, center=False, return_complex=True)
    return found / window.square().sum().sqrt()


def spectra_distance(decoded: Tensor, wanted: Tensor) -> Tensor:
    """How far spectra are from each other, low frequencies counting more as they do in hearing; the mean over the
    resolutions. [B, n] each. Compared are magnitudes, and how phases turn from frame to frame: magnitudes alone leave
    a rough voice, whose harmonics lose their phase.
    """
    distances = []
    for size in STFT_SIZES:
        ours, theirs = spectra(decoded, size), spectra(wanted, size)
        our_size, their_size = magnitudes(ours), magnitudes(theirs)
        apart = (our_size / their_size).log().abs() + 4 * (our_size.sqrt() - their_size.sqrt()).abs()
        turned = (turning(ours) - turning(theirs)).square().sum(-1).add(1e-8).sqrt()
        weights = hearing_weights(size, ours.device)
        distances.append((apart * weights).mean() + TURNING_WEIGHT * (turned * weights).mean())
    return torch.stack(distances).mean()


def magnitudes(spectrum: Tensor) -> Tensor:
    return (torch.view_as_real(spectrum).square().sum(-1) + 1e-9).sqrt() + LOG_FLOOR


def turning(spectrum: Tensor) -> Tensor:
    """[B, F, T] -> [B, F, T - 1, 2]: by how much the phase of every band turns until the next frame, as a complex
    number of the size of a magnitude's square root.
    """
    products = torch.view_as_real(spectrum[..., 1:] * spectrum[..., :-1].conj())
    return products / (products.square().sum(-1, keepdim=True) + 1e-8) ** 0.375


def hearing_weights(size: int, device: torch.device) -> Tensor:
    """[size / 2 + 1, 1], with the mean one."""
    hertz = torch.linspace(0, SAMPLE_RATE / 2, size // 2 + 1, device=device)[:, None]
    weights = 1 / (1 + hertz / 700)
    return weights / weights.mean()


def exact_distance(decoded: Tensor, wanted: Tensor) -> Tensor:
    """How far spectra are from each other as complex numbers of the size of a magnitude's square root: for sounds whose
    phases can be foretold. [B, n] each.
    """
    distances = []
    for size in EXACT_SIZES:
        ours, theirs = rooted(spectra(decoded, size)), rooted(spectra(wanted, size))
        apart = (ours - theirs).square().sum(-1).add(1e-6).sqrt()
        distances.append((apart * hearing_weights(size, decoded.device)).mean())
    return torch.stack(distances).mean()


def rooted(spectrum: Tensor) -> Tensor:
    """[B, F, T] -> [B, F, T, 2]"""
    parts = torch.view_as_real(spectrum)
    return parts / (parts.square().sum(-1, keepdim=True) + 1e-5) ** 0.25
