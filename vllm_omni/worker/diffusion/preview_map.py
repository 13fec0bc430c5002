"""The map from a VAE's latents to colours that makes previews cheap: read beside the VAE, or one that is known.

Knows no weights and computes nothing. tools/fit_preview.py writes the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_omni.errors import CheckpointError
from vllm_omni.utils.checks import brief, check_number
from vllm_omni.utils.files import read_json

PREVIEW_FILE = "preview.json"
HOW_TO_FIT = "write it anew with tools/fit_preview.py, or remove it"
MAX_FACTOR = 1e3


@dataclass(frozen=True, slots=True)
class PreviewMap:
    """red, green, blue = bias + channels @ factors + products of two channels @ products, in 0 to 1, of the channels of
    a latent as the sampler has it (scaled). Products tell colours apart that a linear map mixes up.
    """

    factors: tuple[tuple[float, ...], ...]  # a row of three for each channel
    bias: tuple[float, ...] = (0.5, 0.5, 0.5)
    products: tuple[tuple[float, ...], ...] = ()  # a row for each pair: 0 and 0, 0 and 1, ..., 1 and 1, 1 and 2, ...

    @classmethod
    def of_vae(cls, folder: Path) -> PreviewMap | None:
        """The map of a diffusers VAE's folder: its own, else the known one of a published VAE, else None.

        CheckpointError for a file that does not fit the VAE.
        """
        config = read_json(folder / "config.json")
        path = folder / PREVIEW_FILE
        if path.is_file():
            key = "z_dim" if "z_dim" in config else "latent_channels"
            num_channels = config.get(key, 4)
            check_number(f"{folder / 'config.json'}: {key}", num_channels, 1, integer=True, raises=CheckpointError)
            return cls.from_dict(read_json(path), num_channels, str(path))
        known = (preview for vae, preview in KNOWN if all(_plain(config.get(key)) == vae[key] for key in vae))
        return next(known, None)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], num_channels: int, where: str) -> PreviewMap:
        """The content of PREVIEW_FILE, a JSON object of these fields (`products` may be missing), checked."""
        products = raw.get("products", [])
        return cls(
            factors=_rows(f"{where}: factors", raw.get("factors"), num_channels),
            bias=_colour(f"{where}: bias", raw.get("bias")),
            products=_rows(f"{where}: products", products, num_pairs(num_channels)) if products != [] else (),
        )


def num_pairs(num_channels: int) -> int:
    """Of channels, each with itself and with those behind it."""
    return num_channels * (num_channels + 1) // 2


def _rows(where: str, rows: object, count: int) -> tuple[tuple[float, ...], ...]:
    if not isinstance(rows, list) or len(rows) != count:
        got = f"{len(rows)} rows" if isinstance(rows, list) else brief(rows)
        raise CheckpointError(f"{where}: got {got}, expected {count}; {HOW_TO_FIT}")
    return tuple(_colour(f"{where}[{index}]", row) for index, row in enumerate(rows))


def _colour(where: str, values: object) -> tuple[float, ...]:
    if not isinstance(values, list) or len(values) != 3:
        raise CheckpointError(f"{where}: got {brief(values)}, expected three numbers; {HOW_TO_FIT}")
    for value in values:
        check_number(where, value, -MAX_FACTOR, MAX_FACTOR, raises=CheckpointError, hint=f"; {HOW_TO_FIT}")
    return tuple(float(value) for value in values)


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


# The VAE of FLUX.1, which Z-Image has too.
FLUX_1_VAE: Mapping[str, object] = {
    "_class_name": "AutoencoderKL",
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "block_out_channels": (128, 256, 512, 512),
}
# Figures of InvokeAI (Apache-2.0), invokeai/app/util/step_callback.py, which fits -1 to 1; halved here for 0 to 1.
_FLUX_1_FACTORS = (
    (-0.0412, 0.0149, 0.0521),
    (0.0056, 0.0291, 0.0768),
    (0.0342, -0.0681, -0.0427),
    (-0.0258, 0.0092, 0.0463),
    (0.0863, 0.0784, 0.0547),
    (-0.0017, 0.0402, 0.0158),
    (0.0501, 0.1058, 0.1152),
    (-0.0209, -0.0218, -0.0329),
    (-0.0314, 0.0083, 0.0896),
    (0.0851, 0.0665, -0.0472),
    (-0.0534, 0.0238, -0.0024),
    (0.0452, -0.0026, 0.0048),
    (0.0892, 0.0831, 0.0881),
    (-0.1117, -0.0304, -0.0789),
    (0.0027, -0.0479, -0.0043),
    (-0.1146, -0.0827, -0.0598),
)
FLUX_1 = PreviewMap(tuple(tuple(value / 2 for value in row) for row in _FLUX_1_FACTORS))
# The VAE of Wan 2.1, which Qwen-Image has too. Its latents are scaled channel by channel.
VIDEO_VAE: Mapping[str, object] = {
    "z_dim": 16,
    "latents_mean": (
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    ),
}
# Figures of Blissful Tuner (Apache-2.0), latent_preview.py, which fit -1 to 1; halved here for 0 to 1.
_VIDEO_FACTORS = (
    (-0.1299, -0.1692, 0.2932),
    (0.0671, 0.0406, 0.0442),
    (0.3568, 0.2548, 0.1747),
    (0.0372, 0.2344, 0.1420),
    (0.0313, 0.0189, -0.0328),
    (0.0296, -0.0956, -0.0665),
    (-0.3477, -0.4059, -0.2925),
    (0.0166, 0.1902, 0.1975),
    (-0.0412, 0.0267, -0.1364),
    (-0.1293, 0.0740, 0.1636),
    (0.0680, 0.3019, 0.1128),
    (0.0032, 0.0581, 0.0639),
    (-0.1251, 0.0927, 0.1699),
    (0.0060, -0.0633, 0.0005),
    (0.3477, 0.2275, 0.2950),
    (0.1984, 0.0913, 0.1861),
)
VIDEO = PreviewMap(
    tuple(tuple(value / 2 for value in row) for row in _VIDEO_FACTORS),
    bias=tuple(0.5 + value / 2 for value in (-0.1835, -0.0868, -0.3360)),
)
KNOWN = ((FLUX_1_VAE, FLUX_1), (VIDEO_VAE, VIDEO))
