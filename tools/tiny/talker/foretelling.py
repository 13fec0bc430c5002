"""The package's talker and code predictor as they are trained: all positions at once, all codes being known.

Legend: B rows, L positions, D hidden size, Q codes of a frame, N frames.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.tiny.talker.shapes import model_config
from vllm_omni.layers.decoder import Decoder, DecoderLayer
from vllm_omni.layers.rotary import rotate
from vllm_omni.models.qwen3_tts.config import TalkerConfig
from vllm_omni.models.qwen3_tts.talker import Talker
from vllm_omni.worker.ar.frames.code_predictor import CodePredictor

EMBEDDING = 0.5  # deviation


@functools.cache
def talker_config(text_vocab_size: int) -> TalkerConfig:
    return TalkerConfig.from_json(model_config(text_vocab_size), "config.json")


def fresh_talker(text_vocab_size: int) -> Talker:
    """Random weights."""
    config = talker_config(text_vocab_size)
    model = Talker(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
        elif "embedding" in name:
            nn.init.normal_(parameter, std=EMBEDDING)
        else:
            gain = (2 * config.num_layers) ** -0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            nn.init.normal_(parameter, std=gain * (0.3 if "head" in name else 1.0) * parameter.shape[1] ** -0.5)
    return model


def layers(decoder: Decoder, x: Tensor, keep: int = 0) -> tuple[Tensor, Tensor]:
    """[B, L, D] -> (the states after the norm, those behind the layer `keep`)."""
    kept = x
    cos, sin = decoder.rotary(torch.arange(x.shape[1], device=x.device), x.dtype)
    for number, layer in enumerate(decoder.layers, 1):
        x = x + attended(layer, layer.input_layernorm.plain(x), cos, sin)
        gate, up = F.linear(layer.post_attention_layernorm.plain(x), layer.mlp.gate_up_proj.weight).chunk(2, -1)
        x = x + F.linear(F.silu(gate) * up, layer.mlp.down_proj.weight)
        kept = x if number == keep else kept
    return decoder.norm.plain(x), kept


def attended(layer: DecoderLayer, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    part, head_dim = layer.self_attn, cos.shape[-1]
    heads, kv_heads = part.num_heads
    qkv = F.linear(x, part.qkv_proj.weight).unflatten(-1, (-1, head_dim))
    query, key, value = qkv.split([heads, kv_heads, kv_heads], dim=2)
    query, key = rotate(part.q_norm.plain(query), cos, sin), rotate(part.k_norm.plain(key), cos, sin)
    key, value = (one.repeat_interleave(heads // kv_heads, dim=2) for one in (key, value))
    query, key, value = (one.transpose(1, 2).to(qkv.dtype) for one in (query, key, value))
    made = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return F.linear(made.transpose(1, 2).flatten(2), part.o_proj.weight)


def rows_of(model: Talker, text: Tensor, marks: Tensor, frames: Tensor) -> Tensor:
    """text, marks: [B, L], below zero for none; frames: [B, L, Q], likewise -> [B, L, D]."""
    projection = model.text_projection
    all_text = F.linear(model.text_embedding.weight, projection.linear_fc1.weight, projection.linear_fc1.bias)
    all_text = F.linear(F.silu(all_text), projection.linear_fc2.weight, projection.linear_fc2.bias)
    x = F.embedding(text.clamp(min=0), all_text) * (text >= 0)[..., None]
    x = x + model.codec_embedding(marks.clamp(min=0)) * (marks >= 0)[..., None]
    codes = frames.clamp(min=0)
    spoken = model.codec_embedding(codes[..., 0]) + others(model.code_predictor, codes[..., 1:]).sum(-2)
    return x + spoken * (frames[..., :1] >= 0)


def others(predictor: CodePredictor, codes: Tensor) -> Tensor:
    """[..., Q - 1] -> [..., Q - 1, D]: the embeddings of all codes but the first."""
    offsets = torch.arange(codes.shape[-1], device=codes.device) * predictor.config.vocab_size
    found: Tensor = predictor.codec_embedding(codes + offsets)
    return found


def first_logits(model: Talker, states: Tensor) -> Tensor:
    return F.linear(states, model.codec_head.weight)


def other_logits(model: Talker, states: Tensor, fed: Tensor) -> Tensor:
    """states: [N, D], the talker's; fed: [N, Q], the codes that are fed, of which the last is not -> [N, Q - 1, V]."""
    predictor = model.code_predictor
    first = model.codec_embedding(fed[:, 0])
    rows = torch.cat([states[:, None], first[:, None], others(predictor, fed[:, 1:])[:, :-1]], 1)
    made, _ = layers(predictor.decoder, rows)
    return torch.stack([F.linear(made[:, place], head.weight) for place, head in enumerate(predictor.lm_head, 1)], 1)
