"""The package's speech decoder as it is trained: the same layers over whole pieces, by convolutions that can be
differentiated. Channels come before steps here.

Legend: B rows, n frames, Q codebooks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.tiny.talker.shapes import codec_config
from vllm_omni.layers.rotary import rotate
from vllm_omni.models.qwen3_tts.codec.blocks import ConvNeXtBlock, ResidualUnit, Snake
from vllm_omni.models.qwen3_tts.codec.config import CodecDecoderConfig
from vllm_omni.models.qwen3_tts.codec.convolution import CausalConv, TransposedConv
from vllm_omni.models.qwen3_tts.codec.decoder import CodecDecoder
from vllm_omni.models.qwen3_tts.codec.transformer import TransformerLayer, WindowTransformer

BRANCH = 0.3  # what residual branches begin with
QUIET_END = 0.0005  # deviation of the last weights: softer than speech


def fresh_decoder() -> CodecDecoder:
    """Random weights; every book of codes has the row zero for silence."""
    raw = codec_config()["decoder_config"]
    decoder = CodecDecoder(CodecDecoderConfig.of_residual_codes(raw, "decoder_config"))
    for name, parameter in list(decoder.named_parameters()):
        owner, _, kind = name.rpartition(".")
        parameter.data = parameter.data.contiguous()
        if kind in ("bias", "alpha", "beta"):
            nn.init.zeros_(parameter)
        elif kind in ("gamma", "scale"):
            nn.init.constant_(parameter, BRANCH)
        elif parameter.dim() == 1:
            nn.init.ones_(parameter)
        else:
            fan_in = parameter[0].numel()
            layer = decoder.get_submodule(owner)
            if isinstance(layer, TransposedConv):  # [in, out, kernel]: one or two steps meet in each
                fan_in = parameter.shape[0] * (2 if layer.overlaps else 1)
            std = (BRANCH if owner.endswith("conv2") else 1.0) * fan_in**-0.5
            nn.init.normal_(parameter, std=std)
    nn.init.normal_(decoder.decoder[-1].weight, std=QUIET_END)
    return decoder


def latents(decoder: CodecDecoder, first: Tensor, rest: Tensor) -> Tensor:
    """first, rest: [B, n, width], rows of the first book, and the sum of rows of all others -> [B, n, codebook_dim]."""
    books = decoder.codebooks
    return F.linear(first, books.first[:, :, 0]) + F.linear(rest, books.rest[:, :, 0])


def coded(decoder: CodecDecoder, rows: Tensor, codes: Tensor) -> Tensor:
    """rows: [Q, V, width]; codes: [B, n, Q] -> [B, n, codebook_dim]."""
    found = [F.embedding(codes[..., book], rows[book]) for book in range(len(rows))]
    return latents(decoder, found[0], torch.stack(found[1:]).sum(0))


def decode(decoder: CodecDecoder, latent: Tensor) -> Tensor:
    """[B, n, codebook_dim] -> [B, samples]; what the package's forward gives of a beginning, before it is clamped."""
    x = causal(decoder.pre_conv, latent.transpose(1, 2)).transpose(1, 2)
    x = transform(decoder.pre_transformer, x).transpose(1, 2)
    for upsample, block in decoder.upsample:
        x = wide(block, spread(upsample, x))
    first, *blocks, act, last = decoder.decoder
    x = causal(first, x)
    for part in blocks:
        before, upsample, *units = part.block
        x = spread(upsample, snake(before, x))
        for unit in units:
            x = residual(unit, x)
    return causal(last, snake(act, x))[:, 0]


def causal(layer: CausalConv, x: Tensor) -> Tensor:
    padded = F.pad(x, ((layer.kernel - 1) * layer.dilation, 0))
    return F.conv1d(padded, layer.weight, layer.bias, dilation=layer.dilation)


def spread(layer: TransposedConv, x: Tensor) -> Tensor:
    made = F.conv_transpose1d(x, layer.weight, layer.bias, stride=layer.stride)
    return made[:, :, : x.shape[2] * layer.stride]


def residual(unit: ResidualUnit, x: Tensor) -> Tensor:
    return x + causal(unit.conv2, snake(unit.act2, causal(unit.conv1, snake(unit.act1, x))))


def wide(block: ConvNeXtBlock, x: Tensor) -> Tensor:
    layer = block.dwconv
    made = F.conv1d(F.pad(x, (layer.kernel - 1, 0)), layer.weight, layer.bias, groups=layer.channels)
    made = F.gelu(plain(block.pwconv1, block.norm(made.transpose(1, 2))))
    return x + (block.gamma * plain(block.pwconv2, made)).transpose(1, 2)


def plain(layer: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


class Wave(torch.autograd.Function):
    """x + a sin(f x)^2, which keeps x alone for the way back. x: [B, C, n]; f, a: [C, 1]."""

    @staticmethod
    def forward(ctx, x: Tensor, frequency: Tensor, amplitude: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, frequency, amplitude)
        return torch.addcmul(x, (x * frequency).sin_().square_(), amplitude)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[no-untyped-def]
        x, frequency, amplitude = ctx.saved_tensors
        angle = x * frequency
        by_amplitude = (grad * angle.sin().square_()).sum((0, 2))[:, None]
        turned = angle.mul_(2).sin_().mul_(grad)  # the slope of the square, times what comes
        by_frequency = amplitude * (turned * x).sum((0, 2))[:, None]
        return torch.addcmul(grad, turned, amplitude * frequency), by_frequency, by_amplitude


def snake(act: Snake, x: Tensor) -> Tensor:
    made: Tensor = Wave.apply(x, act.alpha.exp()[:, None], (act.beta.exp() + 1e-9).reciprocal()[:, None])
    return made


def transform(model: WindowTransformer, x: Tensor) -> Tensor:
    """[B, n, latent_dim] -> the same shape."""
    places = torch.arange(x.shape[1], device=x.device)
    distance = places[:, None] - places
    mask = (distance >= 0) & (distance < model.window)
    cos, sin = model.rotary(places, x.dtype)
    x = plain(model.input_proj, x)
    for layer in model.layers:
        x = attended(layer, x, cos, sin, mask)
        gate, up = F.linear(layer.post_attention_layernorm.plain(x), layer.mlp.gate_up_proj.weight).chunk(2, -1)
        x = x + layer.mlp_layer_scale(plain(layer.mlp.down_proj, F.silu(gate) * up))
    return plain(model.output_proj, model.norm.plain(x))


def attended(layer: TransformerLayer, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
    part = layer.self_attn
    qkv = F.linear(layer.input_layernorm.plain(x), part.qkv_proj.weight).unflatten(-1, (-1, part.head_dim))
    query, key, value = qkv.split([part.num_heads, part.num_kv_heads, part.num_kv_heads], dim=2)
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    made = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask
    )
    return x + layer.self_attn_layer_scale(F.linear(made.transpose(1, 2).flatten(2), part.o_proj.weight))
