"""The numbers of a LoRA file, whose plan is checked, as an adapter of a loaded model."""

from __future__ import annotations

import torch
from safetensors import safe_open
from torch import Tensor, nn

from vllm_omni.errors import CheckpointError, InvalidRequestError
from vllm_omni.layers.lora import Adapter, LowRank
from vllm_omni.worker.lora.folders import LoRAFile
from vllm_omni.worker.lora.plan import LoRAPlan, Piece, opened


@torch.no_grad()
def load_adapter(plan: LoRAPlan, model: nn.Module, device: torch.device, dtype: torch.dtype) -> Adapter:
    """InvalidRequestError for a file that was changed since, CheckpointError for numbers that are not finite."""
    path = plan.file.path
    if LoRAFile.of(path) != plan.file:
        raise InvalidRequestError(f"lora: {path} was changed while the request waited; send it again")
    layers: dict[nn.Module, list[LowRank]] = {}
    with opened(path) as handle:
        for piece in plan.pieces:
            layer = model.get_submodule(piece.place.layer)
            layers.setdefault(layer, []).append(_low_rank(handle, piece, device, dtype, str(path)))
    return Adapter({layer: tuple(parts) for layer, parts in layers.items()}, plan.num_bytes(dtype.itemsize))


def _low_rank(handle: safe_open, piece: Piece, device: torch.device, dtype: torch.dtype, where: str) -> LowRank:
    place = piece.place
    down = _read(handle, piece.down, (piece.rank, place.num_inputs), where)
    up = _read(handle, piece.up, (place.num_outputs, piece.rank), where) * piece.factor
    found = [matrix.to(device=device, dtype=dtype) for matrix in (down, up)]
    if not all(bool(matrix.isfinite().all()) for matrix in found):
        raise CheckpointError(f"{where}: {piece.down:.120} or its up holds what is no finite number in {dtype}")
    return LowRank(place.columns, *found)


def _read(handle: safe_open, name: str, shape: tuple[int, int], where: str) -> Tensor:
    tensor: Tensor = handle.get_tensor(name)
    if tensor.numel() != shape[0] * shape[1]:
        raise CheckpointError(f"{where}: {name:.120} was changed while it was read")
    return tensor.reshape(shape).float()
