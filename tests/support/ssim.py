"""Structural similarity of two pictures (Wang et al. 2004): 1 for the same, near 0 for unrelated ones."""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

SIGMA = 1.5
FLAT, DARK = (0.03 * 255) ** 2, (0.01 * 255) ** 2


def ssim(one: Image.Image, other: Image.Image) -> float:
    """Mean over pixels and colours, in Gaussian windows."""
    assert one.size == other.size
    x, y = (np.asarray(picture.convert("RGB"), dtype=np.float64) for picture in (one, other))

    def smooth(values: np.ndarray) -> np.ndarray:
        return gaussian_filter(values, (SIGMA, SIGMA, 0))

    mean_x, mean_y = smooth(x), smooth(y)
    spread = smooth(x * x) - mean_x**2 + smooth(y * y) - mean_y**2
    together = smooth(x * y) - mean_x * mean_y
    likeness = (2 * mean_x * mean_y + DARK) * (2 * together + FLAT)
    return float((likeness / ((mean_x**2 + mean_y**2 + DARK) * (spread + FLAT))).mean())
