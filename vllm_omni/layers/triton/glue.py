"""The kernels as layers call them. What is computed is `layers.norm`'s, `layers.modulation`'s, `layers.heads`',
`layers.rotary`'s and `layers.float8`'s to say; callers have asked `library.takes`.

Legend: R samples, L tokens of each, N rows, D width, H query heads, K key-value heads, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_omni.layers.triton.library import power_of_two
from vllm_omni.utils.device import current_device

WIDE_ROW = 2048  # numbers, from which on a program has more warps
HEADS_OF_PROGRAM = 8
COLUMNS_OF_PROGRAM = 1024
NUMBERS_OF_TILE = 8192
AS_ROUNDED = {"enable_fp_fusion": False}  # else a product is not rounded before it is added to something


@dataclass(frozen=True, slots=True)
class RowNorm:
    """weight: [D] of an RMSNorm; None: a LayerNorm without weights."""

    weight: Tensor | None
    epsilon: float


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Of queries and keys, head by head: RMSNorms [d]."""

    query: RowNorm
    key: RowNorm


@dataclass(frozen=True, slots=True)
class Turns:
    """Cosines and sines [places, d / 2]: of numbers whose parts are neighbours, or the halves of a head."""

    cos: Tensor
    sin: Tensor
    are_neighbours: bool
    rounds_products: bool  # to the dtype of the heads, as transformers' language models do


def norm_rows(
    x: Tensor, norm: RowNorm, scale: Tensor | None = None, shift: Tensor | None = None, update: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """norm(x + update) * (1 + scale) + shift, and x + update. x, update: [R, L, D] or [N, D]; scale, shift: [R, 1, D].
    Without an update the second is x.
    """
    from vllm_omni.layers.triton import kernels

    rows, width = _rows(x), x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = out if update is None else torch.empty_like(out)
    added = rows if update is None else _rows(update)
    weight = x if norm.weight is None else norm.weight
    scales, shifts = (x if given is None else given for given in (scale, shift))
    if rows.shape[0]:
        with current_device(x.device):
            kernels.norm_rows[(rows.shape[0],)](
                *(out, total, rows, added, weight, scales, shifts, _rows_per_sample(x)),
                *(rows.stride(0), added.stride(0), scales.stride(0), shifts.stride(0), norm.epsilon),
                WIDTH=width,
                BLOCK=power_of_two(width),
                IS_CENTRED=norm.weight is None,
                HAS_UPDATE=update is not None,
                HAS_SCALE=scale is not None,
                HAS_SHIFT=shift is not None,
                num_warps=_warps(width),
                **AS_ROUNDED,
            )
    return out, x if update is None else total


def gate_rows(x: Tensor, update: Tensor, gate: Tensor | None, norm: RowNorm | None) -> Tensor:
    """x + gate * norm(update). x, update: [R, L, D]; gate: [R, 1, D]."""
    from vllm_omni.layers.triton import kernels

    rows, added, width = _rows(x), _rows(update), x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    gates = x if gate is None else gate
    weight = None if norm is None else norm.weight
    if rows.shape[0]:
        with current_device(x.device):
            kernels.gate_rows[(rows.shape[0],)](
                *(out, rows, added, gates, x if weight is None else weight, _rows_per_sample(x)),
                *(rows.stride(0), added.stride(0), gates.stride(0), 0.0 if norm is None else norm.epsilon),
                WIDTH=width,
                BLOCK=power_of_two(width),
                IS_CENTRED=weight is None,
                HAS_NORM=norm is not None,
                HAS_GATE=gate is not None,
                num_warps=_warps(width),
                **AS_ROUNDED,
            )
    return out


def swiglu_rows(gate_up: Tensor) -> Tensor:
    """[..., 2 D], gates first -> [..., D]."""
    from vllm_omni.layers.triton import kernels

    gate_up = gate_up.contiguous()
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    num_rows = out.numel() // width
    if num_rows:
        with current_device(out.device):
            kernels.swiglu_rows[(num_rows, -(-width // COLUMNS_OF_PROGRAM))](
                out, gate_up, width, BLOCK=COLUMNS_OF_PROGRAM, **AS_ROUNDED
            )
    return out


def place_heads(heads: Tensor, num_heads: int, num_kv_heads: int, norms: HeadNorms | None, turns: Turns) -> None:
    """heads: [N, >= (H + K) d], queries, then keys, written in place: normed, then turned; row i stands at the place
    i % places.
    """
    from vllm_omni.layers.triton import kernels

    half = turns.cos.shape[-1]
    block = min(HEADS_OF_PROGRAM, power_of_two(num_heads + num_kv_heads))
    first = turns.cos if norms is None or norms.query.weight is None else norms.query.weight
    second = turns.cos if norms is None or norms.key.weight is None else norms.key.weight
    if len(heads):
        with current_device(heads.device):
            kernels.place_heads[(len(heads), -(-(num_heads + num_kv_heads) // block))](
                *(heads, first, second, turns.cos, turns.sin, heads.stride(0), len(turns.cos), *turns.cos.stride()),
                *(0.0 if norms is None else norms.query.epsilon, 0.0 if norms is None else norms.key.epsilon),
                NUM_HEADS=num_heads,
                NUM_KV_HEADS=num_kv_heads,
                HALF=half,
                BLOCK_H=block,
                BLOCK_D=power_of_two(half),
                HAS_NORMS=norms is not None,
                ARE_NEIGHBOURS=turns.are_neighbours,
                ROUNDS_PRODUCTS=turns.rounds_products,
                **AS_ROUNDED,
            )


def store_rows(kv_cache: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
    """key, value: [N, K, d], each row dense; kv_cache: [2, blocks, block_size, K, d]; slots: [N] int64."""
    from vllm_omni.layers.triton import kernels

    width = key.shape[1] * key.shape[2]
    block = min(COLUMNS_OF_PROGRAM, power_of_two(width))
    if len(key):
        with current_device(key.device):
            kernels.store_rows[(len(key), -(-width // block))](
                *(kv_cache[0], kv_cache[1], key, value, slots, key.stride(0), value.stride(0)), WIDTH=width, BLOCK=block
            )


def group_norm(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """Over each group of channels of each sample. x: [R, C, H, W], channels last in memory, C and groups powers of two;
    weight, bias: [C].
    """
    from vllm_omni.layers.triton import kernels

    samples, width = x.shape[:2]
    num_pixels = x.shape[2] * x.shape[3]
    pixels = max(1, NUMBERS_OF_TILE // width)
    chunks = -(-num_pixels // pixels)
    means, squares = torch.empty(2, samples, chunks, num_groups, dtype=torch.float32, device=x.device)
    out = torch.empty_like(x)
    with current_device(x.device):
        sizes = {"WIDTH": width, "PIXELS": pixels}
        kernels.group_moments[(chunks, samples)](means, squares, x, num_pixels, GROUPS=num_groups, **sizes)
        per_group = width // num_groups
        mean, variance = _merged(means, squares / per_group, num_pixels, pixels)
        scale = weight.float() * (variance + epsilon).rsqrt().repeat_interleave(per_group, dim=1)
        shift = bias.float() - mean.repeat_interleave(per_group, dim=1) * scale
        kernels.scale_channels[(chunks, samples)](out, x, scale, shift, num_pixels, **sizes)
    return out


def _merged(means: Tensor, squares: Tensor, num_pixels: int, pixels: int) -> tuple[Tensor, Tensor]:
    """The mean and the variance [R, groups] from those of chunks of `pixels` pixels, the last with what is left (Chan
    et al., "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979). squares: by the pixel.
    """
    chunks = means.shape[1]
    shares = torch.full((chunks, 1), pixels / num_pixels, device=means.device)
    shares[-1] = 1 - (chunks - 1) * pixels / num_pixels
    mean = (means * shares).sum(1)
    between = ((means - mean[:, None]).square() * shares).sum(1)
    return mean, between + squares.sum(1) / num_pixels


def quantize_rows(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[N, D] -> numbers [N, D] of a float8 dtype and the scales [N] float32 of their rows."""
    from vllm_omni.layers.triton import kernels

    count, width = rows.shape
    out = torch.empty(count, width, dtype=dtype, device=rows.device)
    scales = torch.empty(count, dtype=torch.float32, device=rows.device)
    largest, most = torch.finfo(dtype).max, torch.finfo(torch.float32).max
    if count:
        with current_device(rows.device):
            kernels.quantize_rows[(count,)](
                *(out, scales, rows, rows.stride(0), largest, most),
                WIDTH=width,
                BLOCK=power_of_two(width),
                num_warps=_warps(width),
            )
    return out, scales


def _rows(x: Tensor) -> Tensor:
    """[..., D] -> [N, D], a view where the rows stand evenly apart."""
    return x.reshape(-1, x.shape[-1])


def _rows_per_sample(x: Tensor) -> int:
    return x.shape[1] if x.ndim == 3 else 1


def _warps(width: int) -> int:
    return 4 if width < WIDE_ROW else 8
