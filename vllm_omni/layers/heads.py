"""Queries, keys and values out of one projection: normed head by head, and turned by the positions. Knows no model and
no attention.

Legend: R samples, L tokens of each, N tokens of a step, H query heads, K key-value heads, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_omni.layers.native import diffusion
from vllm_omni.layers.native.library import kernels_for
from vllm_omni.layers.native.structures import HeadRowStruct
from vllm_omni.layers.norm import RMSNorm
from vllm_omni.layers.rotary import rotate
from vllm_omni.layers.triton import glue, library


@dataclass(frozen=True, slots=True)
class HeadShape:
    """are_neighbours: whether the real and the imaginary part of a number stand side by side, or in the halves of a
    head. num_turned: of the queries and of the keys, from the first on, that have positions; None: all.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    are_neighbours: bool
    num_turned: int | None = None


def placed_heads(
    qkv: Tensor, shape: HeadShape, norms: tuple[RMSNorm, RMSNorm] | None, rope: Tensor
) -> tuple[Tensor, ...]:
    """qkv: [R, L, (H + 2 K) d], which is overwritten; norms: of queries and keys; rope: [L, d / 2, 2] float32 cosines
    and sines -> queries [R, H, L, d], keys and values [R, K, L, d].
    """
    if library.takes(qkv) and qkv.is_contiguous() and shape.num_turned is None:
        head_norms = None if norms is None else glue.HeadNorms(norms[0].rows(), norms[1].rows())
        turns = glue.Turns(rope[..., 0], rope[..., 1], shape.are_neighbours, rounds_products=False)
        glue.place_heads(qkv.flatten(0, 1), shape.num_heads, shape.num_kv_heads, head_norms, turns)
        return _split(qkv, shape)
    functions = kernels_for(qkv)
    if functions is None or not qkv.is_contiguous():
        return plain_placed_heads(qkv, shape, norms, rope)
    diffusion.place(functions, qkv, head_row(shape, norms), rope.contiguous())
    return _split(qkv, shape)


def head_row(shape: HeadShape, norms: tuple[RMSNorm, RMSNorm] | None) -> HeadRowStruct:
    """What kernels are given of heads; pointers into the norms, which must outlive it."""
    query_norm, key_norm = norms or (None, None)
    return HeadRowStruct(
        *(shape.num_heads, shape.num_kv_heads, shape.num_kv_heads, shape.head_dim),
        shape.num_heads if shape.num_turned is None else shape.num_turned,
        None if query_norm is None else query_norm.weight.data_ptr(),
        None if key_norm is None else key_norm.weight.data_ptr(),
        0.0 if query_norm is None else query_norm.eps,
        shape.are_neighbours,
    )


def plain_placed_heads(
    qkv: Tensor, shape: HeadShape, norms: tuple[RMSNorm, RMSNorm] | None, rope: Tensor
) -> tuple[Tensor, ...]:
    query, key, value = _split(qkv, shape)
    if norms is not None:
        query, key = norms[0](query), norms[1](key)
    turn = turned_neighbours if shape.are_neighbours else turned_halves
    if shape.num_turned is None:
        return turn(query, rope), turn(key, rope), value
    for heads in (query, key):
        heads[:, : shape.num_turned] = turn(heads[:, : shape.num_turned], rope)
    return query, key, value


def placed_rows(
    qkv: Tensor, num_heads: int, num_kv_heads: int, norms: tuple[RMSNorm, RMSNorm] | None, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As language models do it, each token at a place of its own. qkv: [N, (H + 2 K) d], which may be overwritten; cos,
    sin: [N, 1, d] -> queries [N, H, d], keys and values [N, K, d].
    """
    head_dim = cos.shape[-1]
    query, key, value = qkv.unflatten(-1, (-1, head_dim)).split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    if library.takes(qkv, cos, sin):
        head_norms = None if norms is None else glue.HeadNorms(norms[0].rows(), norms[1].rows())
        half = head_dim // 2
        turns = glue.Turns(cos[:, 0, :half], sin[:, 0, :half], are_neighbours=False, rounds_products=True)
        glue.place_heads(qkv, num_heads, num_kv_heads, head_norms, turns)
        return query, key, value
    if norms is not None:
        query, key = norms[0](query), norms[1](key)
    return rotate(query, cos, sin), rotate(key, cos, sin), value


def turned_neighbours(x: Tensor, rope: Tensor) -> Tensor:
    """Turns [..., L, d] by rope [L, d / 2, 2], in float32: one complex product is several times as fast as four real
    ones.
    """
    pairs = x.float().unflatten(-1, (-1, 2)).contiguous()
    product = torch.view_as_complex(pairs) * torch.view_as_complex(rope)
    return torch.view_as_real(product).flatten(-2).to(x.dtype)


def turned_halves(x: Tensor, rope: Tensor) -> Tensor:
    """The same where the halves of the last axis are the real and the imaginary part."""
    real, imaginary = x.float().chunk(2, dim=-1)
    cos, sin = rope.unbind(-1)
    return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=-1).to(x.dtype)


def _split(qkv: Tensor, shape: HeadShape) -> tuple[Tensor, ...]:
    heads = qkv.unflatten(-1, (-1, shape.head_dim)).transpose(1, 2)  # [R, H + 2 K, L, d]
    return heads.split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], dim=1)
