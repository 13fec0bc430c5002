"""What a LoRA file adds to which layers of a model, known from its header: everything that can be wrong with it but its
numbers shows here, before they are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from vllm_omni.errors import CheckpointError
from vllm_omni.utils.checks import check_number
from vllm_omni.worker.lora.folders import LoRAFile
from vllm_omni.worker.lora.naming import (
    ALPHA,
    DOWN,
    PEFT_PREFIX,
    UP,
    NamedLayer,
    is_of_text_encoder,
    listed,
    named_layers,
)
from vllm_omni.worker.lora.scaling import MAX_ALPHA, Scaling, read_scaling
from vllm_omni.worker.lora.target import LoRATarget, Place

MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 50_000
DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # as safetensors calls them -> bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """What a file adds to one place."""

    place: Place
    down: str  # names of its tensors
    up: str
    rank: int
    factor: float  # alpha / rank


@dataclass(frozen=True, slots=True)
class LoRAPlan:
    """A file that fits the model."""

    file: LoRAFile
    pieces: tuple[Piece, ...]

    def num_bytes(self, itemsize: int) -> int:
        """Once it is loaded."""
        widths = ((piece.place.num_inputs + piece.place.num_outputs) * piece.rank for piece in self.pieces)
        return sum(widths) * itemsize


def plan_lora(file: LoRAFile, target: LoRATarget, max_rank: int) -> LoRAPlan:
    """CheckpointError for a file that is damaged, no LoRA, or of another model."""
    where = str(file.path)
    with opened(file.path) as handle:
        names = list(handle.keys())
        if len(names) > MAX_TENSORS:
            raise CheckpointError(f"{where}: got {len(names)} tensors, expected at most {MAX_TENSORS}")
        shapes = {name: _shape(handle, name, where) for name in names}
        layers = named_layers(names, where)
        places = _places(layers, target, where)
        scaling = read_scaling(file.path, handle.metadata())
        if scaling is None:
            scaling = _unsaid(layers, where)
        alphas = {
            layer.name: _alpha(handle, layer.tensors[ALPHA], shapes, where)
            for layer in layers
            if ALPHA in layer.tensors
        }
    pieces = []
    for layer in layers:
        place = places[layer.name]
        rank = _rank(layer, shapes, place, max_rank, where)
        *_, name = layer.dotted()
        factor = scaling.factor(name, rank, alphas.get(layer.name))
        pieces.append(Piece(place, layer.tensors[DOWN], layer.tensors[UP], rank, factor))
    _check_overlaps(layers, places, where)
    return LoRAPlan(file, tuple(pieces))


@contextmanager
def opened(path: Path) -> Iterator[safe_open]:
    """A safetensors file whose header is not larger than any LoRA's; CheckpointError for a damaged one."""
    try:
        with path.open("rb") as raw:
            start = raw.read(8)
        if int.from_bytes(start, "little") > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: its header is too long for a LoRA, or it is no safetensors file")
        with safe_open(str(path), framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged, or no safetensors file ({error})") from error


def _shape(handle: safe_open, name: str, where: str) -> tuple[int, ...]:
    """Without the ones of a convolution of one pixel."""
    tensor = handle.get_slice(name)
    dtype, shape = str(tensor.get_dtype()), [int(size) for size in tensor.get_shape()]
    if dtype not in DTYPES:
        raise CheckpointError(f"{where}: {name:.120}: got dtype {dtype}, expected {', '.join(DTYPES)}")
    while len(shape) > 2 and shape[-1] == 1:
        shape.pop()
    return tuple(shape)


def _places(layers: list[NamedLayer], target: LoRATarget, where: str) -> dict[str, Place]:
    """Every layer of the file in the model; CheckpointError with the list of those that have none."""
    found = {layer.name: target.find(layer) for layer in layers}
    lost = [name for name, place in found.items() if place is None]
    of_text = [name for name in lost if is_of_text_encoder(name)]
    if of_text:
        raise CheckpointError(
            f"{where}: {len(of_text)} of {len(found)} layers are of a text encoder, which is another stage's:"
            f" {listed(of_text)}; give each stage a file of its own"
        )
    if lost:
        raise CheckpointError(
            f"{where}: {len(lost)} of {len(found)} layers are none that this model can adapt: {listed(lost)};"
            " is it a LoRA of another model?"
        )
    return {name: place for name, place in found.items() if place is not None}


def _unsaid(layers: list[NamedLayer], where: str) -> Scaling:
    """diffusers takes a factor of 1 then; a file of PEFT's own is never without its config."""
    lacking = [layer.name for layer in layers if layer.name.startswith(PEFT_PREFIX) and ALPHA not in layer.tensors]
    if lacking:
        raise CheckpointError(
            f"{where}: its alpha is not known: PEFT keeps it in adapter_config.json; copy that beside the file, under"
            " the file's name with the suffix .json"
        )
    return Scaling()


def _alpha(handle: safe_open, name: str, shapes: Mapping[str, tuple[int, ...]], where: str) -> float:
    if prod(shapes[name]) != 1:
        raise CheckpointError(f"{where}: {name:.120} has shape {list(shapes[name])}, expected one number")
    alpha = float(handle.get_tensor(name).item())
    check_number(f"{where}: {name:.120}", alpha, 0, MAX_ALPHA, raises=CheckpointError)
    return alpha


def _rank(layer: NamedLayer, shapes: Mapping[str, tuple[int, ...]], place: Place, max_rank: int, where: str) -> int:
    down, up = (shapes[layer.tensors[kind]] for kind in (DOWN, UP))
    rank = down[0] if len(down) == 2 else 0
    if down != (rank, place.num_inputs) or up != (place.num_outputs, rank):
        raise CheckpointError(
            f"{where}: {layer.name:.120}: got down {list(down)} and up {list(up)}, expected [r, {place.num_inputs}] and"
            f" [{place.num_outputs}, r]; is it a LoRA of another model?"
        )
    if not 1 <= rank <= max_rank:
        raise CheckpointError(f"{where}: {layer.name:.120}: got rank {rank}, expected 1 to {max_rank} (lora.max_rank)")
    return rank


def _check_overlaps(layers: list[NamedLayer], places: Mapping[str, Place], where: str) -> None:
    """One name of a layer and another for the same, or for a part of it, would act twice."""
    seen: dict[str, list[tuple[slice, str]]] = {}
    for layer in layers:
        place = places[layer.name]
        for columns, other in seen.get(place.layer, []):
            if columns.start < place.columns.stop and place.columns.start < columns.stop:
                raise CheckpointError(
                    f"{where}: {layer.name:.120} and {other:.120} are the same layer; keep one of them"
                )
        seen.setdefault(place.layer, []).append((place.columns, layer.name))
