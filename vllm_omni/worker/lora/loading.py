"""The numbers of a LoRA file, whose plan is checked, as an adapter of a loaded model."""

from __future__ import annotations

import torch
from safetensors import safe_open
from torch import Tensor, nn

from vllm_omni.errors import CheckpointError, InvalidRequestError
from vllm_omni.layers.lora import Adapter, LowRank, Up
from vllm_omni.worker.lora.folders import LoRAFile
from vllm_omni.worker.lora.plan import LoRAPlan, Piece, opened


@torch.no_grad()
def load_adapter(plan: LoRAPlan, model: nn.Module, device: torch.device, dtype: torch.dtype) -> Adapter:
    """InvalidRequestError for a file that was changed since, CheckpointError for numbers that are not finite."""
    path = plan.file.path
    if LoRAFile.of(path) != plan.file:
        raise InvalidRequestError(f"lora: {path} was changed while the request waited; send it again")
    by_layer: dict[str, list[Piece]] = {}
    for piece in plan.pieces:
        by_layer.setdefault(piece.place.layer, []).append(piece)
    with opened(path) as handle:
        layers = {
            model.get_submodule(layer): _low_rank(handle, pieces, device, dtype, str(path))
            for layer, pieces in by_layer.items()
        }
    return Adapter(layers, plan.num_bytes(dtype.itemsize))


def _low_rank(handle: safe_open, pieces: list[Piece], device: torch.device, dtype: torch.dtype, where: str) -> LowRank:
    """Of the pieces of one layer."""
    downs, ups, start = [], [], 0
    for piece in pieces:
        place, stop = piece.place, start + piece.rank
        downs.append(_read(handle, piece.down, (piece.rank, place.num_inputs), 1.0, dtype, where))
        up = _read(handle, piece.up, (place.num_outputs, piece.rank), piece.factor, dtype, where)
        ups.append(Up(place.columns, slice(start, stop), up.to(device)))
        start = stop
    return LowRank(torch.cat(downs).to(device), tuple(ups))


def _read(
    handle: safe_open, name: str, shape: tuple[int, int], factor: float, dtype: torch.dtype, where: str
) -> Tensor:
    tensor: Tensor = handle.get_tensor(name)
    if tensor.numel() != shape[0] * shape[1]:
        raise CheckpointError(f"{where}: {name:.120} was changed while it was read")
    found = (tensor.reshape(shape).float() * factor).to(dtype)
    if not bool(found.isfinite().all()):
        raise CheckpointError(f"{where}: {name:.120} holds what is no finite number in {dtype}")
    return found
