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
            num_channels, where = config.get("latent_channels", 4), f"{folder / 'config.json'}: latent_channels"
            check_number(where, num_channels, 1, integer=True, raises=CheckpointError)
            return cls.from_dict(read_json(path), num_channels, str(path))
        return FLUX_1 if all(_plain(config.get(key)) == value for key, value in FLUX_1_VAE.items()) else None

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
