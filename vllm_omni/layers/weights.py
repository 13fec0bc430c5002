"""Weights from safetensors files into a module, also into fused parameters. Never unpickles, never runs a
checkpoint's code.

A model tells with `locate` where a published tensor goes: the parameter and the rows of it that the tensor fills.
The plan is checked whole (nothing missing, nothing left over, all shapes right) before the first byte is copied, and
works on the meta device too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vllm_omni.errors import CheckpointError
from vllm_omni.layers.blocks import WeightStream, lists_of
from vllm_omni.layers.linear import NUMBERS, MergedLinear, PackedLayer, pack_linears, quantize_linears
from vllm_omni.layers.meta_device import give_memory
from vllm_omni.layers.published_quantization import restored, scale_names, scales_of_rows
from vllm_omni.layers.shard import Cut
from vllm_omni.utils.checkpoint_files import check_file
from vllm_omni.utils.checks import brief
from vllm_omni.utils.device import Copies
from vllm_omni.utils.files import read_json
from vllm_omni.utils.memory_pages import give_back
from vllm_omni.utils.variants import is_weights, of_one_variant, variant_of, variants_in

MakeCopies = Callable[[torch.device], Copies]  # for a device
INDEX_SUFFIX = ".safetensors.index.json"
WHOLE_FILE, WHOLE_PIPELINE_FILE = "model.safetensors", "diffusion_pytorch_model.safetensors"
ADAPTER_PREFIX = "adapter_"
SCALE_BYTES = 4  # of an output of a quantised weight
SHARD_NAME = re.compile(r"-\d{5}-of-\d{5}(\.\w+)?\.safetensors$")


@dataclass(frozen=True, slots=True)
class Target:
    """The parameter that a published tensor fills, and which rows of it (None: all)."""

    parameter: str
    rows: slice | None = None


class Loadable(Protocol):
    """A module that knows the published names of its weights."""

    def locate(self, name: str) -> Target | None:
        """Where a published tensor goes; None for a name that the model does not know."""

    def is_ignored(self, name: str) -> bool:
        """Whether a published tensor is rightly left out (a tied copy, a buffer)."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def get_submodule(self, target: str) -> nn.Module: ...


def tensor_files(folder: Path, prefix: str = "", variant: str | None = None) -> dict[str, Path]:
    """Tensor name -> safetensors file, from the index or from the one file in the folder; names that begin with the
    prefix alone. variant: whose files are read, of a folder that has them.
    """
    named = variant is not None and variant in variants_in(folder)
    files = _files_of_variant(folder, str(variant)) if named else _all_tensor_files(folder)
    found = {name: file for name, file in files.items() if name.startswith(prefix)}
    if not found:
        raise CheckpointError(f"{folder}: no tensor whose name begins with {prefix!r}; is it another checkpoint?")
    return found


def _all_tensor_files(folder: Path) -> dict[str, Path]:
    """What transformers would load: a whole file stands above an index, which may be of an earlier conversion; adapters
    and hidden files (such as those that macOS leaves beside each file) are not of the model.
    """
    whole = folder / WHOLE_FILE
    index = None if whole.is_file() else _find_index(folder)
    if index is not None:
        return _indexed_files(index)
    is_there = whole.exists() or whole.is_symlink()  # also as something that is no file, which is said when it is read
    files = [whole] if is_there else _unindexed_files(folder)
    if not files:
        raise CheckpointError(f"{folder}: no .safetensors file; convert the weights (nothing else is ever loaded)")
    return _files_by_name(files)


def _files_of_variant(folder: Path, variant: str) -> dict[str, Path]:
    names = sorted(file.name for file in folder.iterdir() if is_weights(file.name) and variant_of(file.name) == variant)
    index = next((name for name in names if not name.endswith(".safetensors")), None)
    if index is not None:
        return _indexed_files(folder / index)
    return _files_by_name([folder / name for name in names])


def _files_by_name(files: Iterable[Path]) -> dict[str, Path]:
    """By the names of the tensors that the files hold."""
    found: dict[str, Path] = {}
    for file in files:
        with _opened(file) as handle:
            found.update(dict.fromkeys(handle.keys(), file))
    return found


def _find_index(folder: Path) -> Path | None:
    """The index of the model: that of transformers, that of diffusers, else any; a stale one beside a whole file is
    none.
    """
    indices = {file.name: file for file in sorted(folder.glob("*" + INDEX_SUFFIX)) if not file.name.startswith(".")}
    preferred = [f"{stem}{INDEX_SUFFIX}" for stem in ("model", "diffusion_pytorch_model")]
    name = next((name for name in (*preferred, *indices) if name in indices), None)
    if name is None:
        return None
    has_whole = (folder / name.replace(INDEX_SUFFIX, ".safetensors")).is_file()
    is_stale = has_whole and not all(file.is_file() for file in _indexed_files(indices[name]).values())
    return None if is_stale else indices[name]


def _indexed_files(index: Path) -> dict[str, Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: 'weight_map' is missing")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: weight_map: {brief(name)}: got {brief(file)}, expected the name of a .safetensors file in "
                "the same folder"
            )
    return {name: index.parent / file for name, file in weight_map.items()}


def _unindexed_files(folder: Path) -> list[Path]:
    """The shards, where files are named as such, else all that could be of the model; of several variants one."""
    names = [
        file.name
        for file in sorted(folder.glob("*.safetensors"))
        if file.is_file() and not file.name.startswith((".", ADAPTER_PREFIX))
    ]
    files = [folder / name for name in of_one_variant(names)]
    whole = [file for file in files if file.name == WHOLE_PIPELINE_FILE]
    return whole or [file for file in files if SHARD_NAME.search(file.name)] or files


def tensor_shapes(folder: Path, prefix: str = "", variant: str | None = None) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, from the headers alone; names that begin with the prefix."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file, names in _by_file(tensor_files(folder, prefix, variant)).items():
        with _opened(file) as handle:
            for name in names:
                with _reading(name, file):
                    shapes[name] = tuple(handle.get_slice(name).get_shape())
    return shapes


def plan_loading(
    model: Loadable, shapes: Mapping[str, tuple[int, ...]], where: str, parts: Collection[str] = ("",)
) -> dict[str, Target]:
    """Checkpoint name -> target; CheckpointError when anything is missing, left over or misshapen. parts: submodules of
    which the parameters are filled; "": all.
    """
    parameters = dict(model.named_parameters())
    plan: dict[str, Target] = {}
    filled: Counter[str] = Counter()
    for name, shape in shapes.items():
        target = model.locate(name)
        if target is None or target.parameter not in parameters:
            if model.is_ignored(name):
                continue
            raise CheckpointError(f"{where}: unexpected tensor {name!r}; the model has no place for it")
        parameter = parameters[target.parameter]
        held = parameter.shape if target.rows is None else parameter[target.rows].shape
        cut = cut_of(model, target)
        expected = tuple(held) if cut is None else cut.whole_shape(held)
        if expected != tuple(shape):
            raise CheckpointError(f"{where}: {name!r} has shape {list(shape)}, expected {list(expected)}")
        filled[target.parameter] += held.numel()
        if "" in parts or target.parameter.startswith(tuple(f"{part}." for part in parts)):
            plan[name] = target
    for name, parameter in parameters.items():
        if filled[name] != parameter.numel():
            raise CheckpointError(
                f"{where}: nothing (or not enough) for the parameter {name!r} {list(parameter.shape)}"
            )
    return plan


def locate_merged(model: nn.Module, name: str, merged: Mapping[str, str]) -> Target | None:
    """The parameter for a published name, where projections stand merged. merged: name of a projection -> that of the
    MergedLinear beside it.
    """
    *path, module, kind = name.split(".") if name.count(".") >= 1 else ("", name)
    if module not in merged:
        return Target(name)
    owner = ".".join([*path, merged[module]])
    try:
        layer = model.get_submodule(owner)
    except AttributeError:
        return None
    return Target(f"{owner}.{kind}", layer.rows(module)) if isinstance(layer, MergedLinear) else None


def cut_of(model: Loadable, target: Target) -> Cut | None:
    """Which part of the published tensor the target is; None: the whole of it."""
    owner, _, kind = target.parameter.rpartition(".")
    layer = model.get_submodule(owner)
    return layer.cut(kind, target.rows) if isinstance(layer, PackedLayer) else None


def allocate(
    model: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    quantization: str | None = None,
    make_copies: MakeCopies | None = None,
) -> None:
    """Gives a model that was built on the meta device its memory, not filled. quantization: what those weights are held
    in that can be. make_copies: where those of its blocks are to wait in the host's memory, what brings them to a
    device.
    """
    choose_numbers(model, dtype, quantization)
    lists = lists_of(model) if make_copies is not None else []
    if make_copies is not None and lists:
        WeightStream(lists, device, make_copies(device))
    streamed = {id(part) for blocks in lists for part in blocks.modules() if part is not blocks}
    for part in model.modules():
        if id(part) not in streamed:
            give_memory(part, device, recurse=False)
        elif isinstance(part, PackedLayer):
            part.is_streamed = True
    model.eval().requires_grad_(False)


def choose_numbers(model: nn.Module, dtype: torch.dtype, quantization: str | None) -> None:
    """What the weights of a model on the meta device are held in."""
    model.to(dtype)
    if quantization is not None:
        quantize_linears(model, quantization)


@torch.no_grad()
def load_weights(
    model: nn.Module,
    folder: Path,
    prefix: str = "",
    variant: str | None = None,
    parts: Collection[str] = ("",),
) -> None:
    """Fills every parameter of `model` (already on its device) from the memory-mapped files of `folder`, chosen as
    `tensor_files` does; with a prefix from the tensors of such names alone. Then lays the weights out for inference.
    Of what a layer holds a share of, only that share is read. parts: submodules that are filled; "": all.
    """
    files, shapes = tensor_files(folder, prefix, variant), tensor_shapes(folder, prefix, variant)
    scales = _read_scales(files)
    shapes = {name: shape for name, shape in shapes.items() if name not in scale_names(files).values()}
    plan = plan_loading(model, shapes, str(folder), parts)  # type: ignore[arg-type]
    for file, names in _by_file({name: files[name] for name in plan}).items():
        with _opened(file) as handle:
            for name in names:
                cut = cut_of(model, plan[name])  # type: ignore[arg-type]
                scale = scales.get(name)
                if scale is not None:
                    scale = _cut_scales(scales_of_rows(scale, shapes[name][0], f"{folder}: {name}"), cut)
                with _reading(name, file):
                    taken = [handle.get_tensor(name)] if cut is None else _cut_parts(handle, name, cut)
                published = taken[0] if cut is None or len(taken) == 1 else torch.cat(taken, dim=cut.axis)
                _fill(model, plan[name], published, scale, f"{folder}: {name}")
                for read in taken:
                    give_back(read.data_ptr(), _span_bytes(read))
    for part in parts:
        pack_linears(model.get_submodule(part))


def _cut_parts(handle: safe_open, name: str, cut: Cut) -> list[Tensor]:
    """The rows or columns of a published tensor that a rank holds."""
    published = handle.get_slice(name)
    return [published[(*[slice(None)] * cut.axis, taken)] for taken in cut.ranges()]


def _span_bytes(view: Tensor) -> int:
    """From the first number of a view to its last one."""
    return (sum((size - 1) * step for size, step in zip(view.shape, view.stride(), strict=True)) + 1) * view.itemsize


def _cut_scales(scales: Tensor, cut: Cut | None) -> Tensor:
    """[rows] of a published weight -> those of the rows that a rank holds."""
    if cut is None or cut.axis != 0:
        return scales
    return torch.cat([scales[taken] for taken in cut.ranges()])


def _fill(model: nn.Module, target: Target, published: Tensor, scales: Tensor | None, where: str) -> None:
    """Puts one published tensor in its place; numbers in 8 bits stay as they are where the weight is held in
    such. scales: of its rows.
    """
    owner, _, kind = target.parameter.rpartition(".")
    layer = model.get_submodule(owner)
    rows = slice(None) if target.rows is None else target.rows
    if isinstance(layer, PackedLayer) and kind == "weight":
        is_kept = published.dtype == layer.weight.dtype and scales is not None
        layer.fill(rows, published if is_kept else restored(published, scales, where), scales if is_kept else None)
    else:
        destination: Tensor = getattr(layer, kind).data
        destination[rows].copy_(restored(published, scales, where))


def _read_scales(files: Mapping[str, Path]) -> dict[str, Tensor]:
    """Name of a quantised tensor -> its scale."""
    scales: dict[str, Tensor] = {}
    for name, scale_name in scale_names(files).items():
        with _opened(files[scale_name]) as handle, _reading(scale_name, files[scale_name]):
            scales[name] = handle.get_tensor(scale_name)
    return scales


def load_rows(folder: Path, name: str, indices: Sequence[int], width: int, variant: str | None = None) -> Tensor:
    """The rows [len(indices), width] of one published tensor, in the file's dtype; nothing else of it is read. The file
    is chosen as `tensor_files` does.
    """
    file = tensor_files(folder, name, variant)[name]
    with _opened(file) as handle, _reading(name, file):
        rows = handle.get_slice(name)
        shape = list(rows.get_shape())
        if len(shape) != 2 or shape[1] != width or not all(0 <= index < shape[0] for index in indices):
            raise CheckpointError(
                f"{file}: {name!r} has shape {shape}, expected rows {sorted(set(indices))} of width {width}"
            )
        return torch.cat([rows[index : index + 1] for index in indices])


def weights_bytes(
    folder: Path, itemsize: int, prefix: str = "", left_out: tuple[str, ...] = (), variant: str | None = None
) -> int:
    """Bytes of all tensors of a folder (whose names begin with the prefix, and not with what is left out) once they are
    loaded with this item size.
    """
    total = 0
    for name, shape in tensor_shapes(folder, prefix, variant).items():
        if name.startswith(left_out):
            continue
        count = 1
        for size in shape:
            count *= size
        total += count * itemsize
    return total


def saved_bytes(model: nn.Module, itemsize: int, quantization: str) -> int:
    """Bytes by which a model, on the meta device, is smaller quantised than with this item size."""
    layers = [part for part in model.modules() if isinstance(part, PackedLayer) and part.takes(quantization)]
    held = NUMBERS[quantization].itemsize
    scales = sum(len(layer.weight) for layer in layers) * SCALE_BYTES if held == 1 else 0
    return sum(layer.weight.numel() for layer in layers) * (itemsize - held) - scales


def _by_file(files: Mapping[str, Path]) -> dict[Path, list[str]]:
    grouped: dict[Path, list[str]] = {}
    for name, file in files.items():
        grouped.setdefault(file, []).append(name)
    return grouped


@contextmanager
def _opened(file: Path) -> Iterator[safe_open]:
    check_file(file)
    try:
        with safe_open(str(file), framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: damaged safetensors file ({error})") from error


@contextmanager
def _reading(name: str, file: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise CheckpointError(f"{file}: tensor {name!r} cannot be read ({error})") from error
