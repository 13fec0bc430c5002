"""A diffusers pipeline folder before it is loaded: its index, the parts that hold weights, the variant of their files.

Only classes of diffusers and transformers are loaded, only from safetensors files; code in the folder is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from vllm_omni.engine.diffusers.pipeline_inputs import MediaFormat
from vllm_omni.errors import CheckpointError, ConfigError
from vllm_omni.layers.weights import weights_bytes
from vllm_omni.utils.checks import brief
from vllm_omni.utils.files import read_json
from vllm_omni.utils.variants import (
    check_variant,
    is_weights,
    said_variants,
    serving_variants,
    variant_of,
    variants_in,
)
from vllm_omni.worker.published_dtype import dtype_of_headers

INDEX = "model_index.json"
LIBRARIES = ("diffusers", "transformers")
MAX_VAE_BLOCKS = 10
# where published pipelines keep their sample rate, as (component, key of its config)
SAMPLE_RATES = (
    ("vae", "sampling_rate"),
    ("vocoder", "sampling_rate"),
    ("vocoder", "output_sampling_rate"),
    ("audio_vae", "sample_rate"),
    ("vae", "sample_rate"),
    ("unet", "sample_rate"),
    ("mel", "sample_rate"),
)


class PipelineFolder:
    """Reads the index when it is made. variant: which files to load ("fp16"); None: the plain ones or, where a part has
    one variant alone, that one.
    """

    def __init__(self, path: Path, variant: str | None = None) -> None:
        self.path = path
        self.index = read_json(path / INDEX)
        self.components = {name: entry for name, entry in self.index.items() if self._is_component(name, entry)}
        self._refuse_code()
        self._check_parts()
        self.variant = self._chosen_variant(variant)

    @property
    def named_class(self) -> object:
        """What the index says of the pipeline's class, unchecked."""
        return self.index.get("_class_name")

    def check_left_out(self, parts: Collection[str]) -> None:
        """ConfigError for one of the pipeline's parts that is left out in a way that diffusers does not read."""
        for name in sorted(parts):
            if name in self.index and self.index[name] is None:
                raise ConfigError(
                    f"{self.path / INDEX}: {name}: got null, expected [library, class], or [null, null] for a part that"
                    " is left out"
                )

    def weight_folders(self) -> list[Path]:
        """The parts that hold weights."""
        return [self.path / name for name in self.components if any((self.path / name).glob("*.safetensors"))]

    def weights_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the weights of all parts, from the safetensors headers."""
        return sum(weights_bytes(part, dtype.itemsize) for part in self.weight_folders())

    def published_dtype(self) -> torch.dtype | None:
        """What most weights of all parts are stored in, of the files that are loaded."""
        return dtype_of_headers(file for part in self.weight_folders() for file in self._loaded_files(part))

    def media_format(self) -> MediaFormat:
        """What pictures and sounds the pipeline takes, by its configs."""
        vae = self._config("vae")
        rates = (self._config(part).get(key) for part, key in SAMPLE_RATES)
        found: dict[str, Any] = {
            "rate": next((rate for rate in rates if isinstance(rate, int)), None),
            "channels": vae.get("audio_channels"),
            "min_side": _pixels_of_a_latent(vae),
            "mode": "RGBA" if vae.get("input_channels", vae.get("in_channels")) == len("RGBA") else None,
        }
        return MediaFormat(**{name: value for name, value in found.items() if value is not None})

    def _loaded_files(self, part: Path) -> list[Path]:
        files = {path: variant_of(path.name) for path in part.glob("*.safetensors") if is_weights(path.name)}
        variant = self.variant if self.variant in files.values() else None
        return [path for path, found in files.items() if found == variant]

    def _config(self, part: str) -> Mapping[str, Any]:
        file = self.path / part / "config.json"
        return read_json(file) if file.is_file() else {}

    def _is_component(self, name: str, entry: object) -> bool:
        """Whether an entry is [library, class]; other lists are settings, as numbers and mappings are. ConfigError for
        a class that could bring code along.
        """
        if name.startswith("_") or not isinstance(entry, list) or len(entry) != 2:
            return False
        library, kind = entry
        if not (isinstance(library, str) and isinstance(kind, (str, type(None)))):
            return False
        is_loadable = kind is not None and _is_loadable(library)
        if not is_loadable and not _is_class_name(library, kind or "") and not (self.path / name).exists():
            return False
        if not is_loadable:
            raise ConfigError(
                f"{self.path / INDEX}: {name}: got {brief(entry)}, expected [library, class] with a library of"
                f" {', '.join(LIBRARIES)} or a pipeline module of diffusers; custom code is not run"
            )
        return True

    def _refuse_code(self) -> None:
        scripts = sorted(self.path.rglob("*.py"))
        if scripts:
            raise ConfigError(
                f"{scripts[0]}: a checkpoint with code; it is never run, so remove the file if it is not needed"
            )

    def _check_parts(self) -> None:
        for name, (library, kind) in self.components.items():
            if not (self.path / name).is_dir():
                raise CheckpointError(
                    f"{self.path / name}: missing, though {INDEX} names {library}.{kind} there; copy the folder whole"
                )

    def _chosen_variant(self, asked: str | None) -> str | None:
        """One variant serves a part that has it, and one that has plain weights; ConfigError where none serves all."""
        found = {part.name: variants_in(part) for part in self.weight_folders()}
        if asked is not None:
            check_variant(asked, found, self.path)
            return asked
        if all(None in variants for variants in found.values()):
            return None
        serving = serving_variants(found)
        if len(serving) != 1:
            missing = "no plain weights; name one of them" if serving else "no one variant of all; convert some"
            raise ConfigError(f"variant: {self.path} has {', '.join(serving) or said_variants(found)} and {missing}")
        return serving[0]


def _pixels_of_a_latent(vae: Mapping[str, Any]) -> int | None:
    """Along each side, where the autoencoder halves the picture before every width but the first."""
    widths = vae.get("block_out_channels")
    return 2 ** (len(widths) - 1) if isinstance(widths, list) and 1 <= len(widths) <= MAX_VAE_BLOCKS else None


def _is_class_name(library: str, kind: str) -> bool:
    """Two words of a setting are no module and its class: what diffusers would import is never one."""
    if not (library.replace(".", "_").isidentifier() and kind.isidentifier()):
        return False
    return kind[:1].isupper() or find_spec(library.partition(".")[0]) is not None


def _is_loadable(library: str) -> bool:
    from diffusers import pipelines

    return library in LIBRARIES or library in dir(pipelines)
