"""Checkpoints whose weights were published in 8 bits, in the format of compressed-tensors (a `weight` and its
`weight_scale`): which of them can be read, and what their numbers mean. Reads no files.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

from torch import Tensor

from vllm_omni.errors import CheckpointError, ConfigError
from vllm_omni.utils.checks import brief

KEY = "quantization_config"
SCALE_SUFFIX = "_scale"
METHOD = "compressed-tensors"
FORMATS = ("int-quantized", "float-quantized", "naive-quantized")
# What the scheme of weights must say; the first is expected
WEIGHTS: Mapping[str, tuple[Any, ...]] = {
    "num_bits": (8,),
    "type": ("int", "float"),
    "strategy": ("channel", "tensor"),
    "symmetric": (True, None),
    "dynamic": (False, None),
}
FIX = "use the checkpoint in bfloat16 and the stage's key `quantization: int8`"


def read_quantization(raw: Mapping[str, Any], where: str) -> Literal["int8", "float8"] | None:
    """What the weights of a config.json were published in; None where they were not quantised, ConfigError for what is
    not supported.
    """
    quantization = raw.get(KEY)
    if quantization is None:
        return None
    where = f"{where}: {KEY}"
    if not isinstance(quantization, Mapping):
        raise ConfigError(f"{where}: got {brief(quantization)}, expected an object")
    _check(quantization, where, {"quant_method": (METHOD,), "format": FORMATS, "kv_cache_scheme": (None,)})
    groups = quantization.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ConfigError(f"{where}.config_groups: got {brief(groups)}, expected an object that is not empty")
    kinds = {_kind_of(group, f"{where}.config_groups.{name}") for name, group in groups.items()}
    return "int8" if kinds == {"int"} else "float8"


def _kind_of(group: Any, where: str) -> str:
    weights, inputs = (
        group.get(key) if isinstance(group, Mapping) else None for key in ("weights", "input_activations")
    )
    if not isinstance(weights, Mapping):
        raise ConfigError(f"{where}.weights: got {brief(weights)}, expected an object; {FIX}")
    _check(weights, f"{where}.weights", WEIGHTS)
    if isinstance(inputs, Mapping):  # of ours, each row has its own scale in any case
        _check(inputs, f"{where}.input_activations", {"dynamic": (True,)})
    return str(weights["type"])


def _check(values: Mapping[str, Any], where: str, expected: Mapping[str, tuple[Any, ...]]) -> None:
    for key, allowed in expected.items():
        if values.get(key) not in allowed:
            words = " or ".join(repr(value) for value in allowed if value is not None or len(allowed) == 1)
            raise ConfigError(f"{where}.{key}: got {brief(values.get(key))}, expected {words}; {FIX}")


def scale_names(names: Collection[str]) -> dict[str, str]:
    """Of the tensors of a checkpoint, each that has a scale -> the name of that."""
    return {name: name + SCALE_SUFFIX for name in names if name + SCALE_SUFFIX in names}


def scales_of_rows(scale: Tensor, rows: int, name: str) -> Tensor:
    """A published scale, of a whole weight or of each row -> [rows] float32."""
    if scale.numel() not in (1, rows):
        raise CheckpointError(f"{name}{SCALE_SUFFIX}: got shape {list(scale.shape)}, expected 1 or {rows} numbers")
    return scale.float().flatten().expand(rows)


def restored(published: Tensor, scales: Tensor | None, name: str) -> Tensor:
    """The numbers that a tensor stands for: float32 where it has the scales [rows] of its rows, else as it is."""
    if scales is not None:
        return published.float() * scales.view(-1, *[1] * (published.dim() - 1))
    if not published.is_floating_point() or published.dtype.itemsize == 1:
        dtype = str(published.dtype).removeprefix("torch.")
        raise CheckpointError(f"{name}: got numbers of {dtype} without {name}{SCALE_SUFFIX}; {FIX}")
    return published
