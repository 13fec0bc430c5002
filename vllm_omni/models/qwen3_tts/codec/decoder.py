"""The causal decoder of 12.5 Hz codecs: codes of some frames, with the state that earlier ones left, become samples.

Frames go through codebooks, a transformer over a window, ConvNeXt upsampling and Snake blocks. Nothing looks ahead, so
that pieces of any sizes join to the samples of the whole.

Legend: B rows, n frames, Q codebooks.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from vllm_omni.layers.meta_device import give_memory, on_meta_device
from vllm_omni.layers.weights import Target, allocate, load_weights
from vllm_omni.models.qwen3_tts.codec.blocks import FeatureUpsampling, SampleUpsampling, Snake
from vllm_omni.models.qwen3_tts.codec.codebooks import ResidualCodebooks, SummedCodebooks
from vllm_omni.models.qwen3_tts.codec.config import EDGE_KERNEL, FIRST_KERNEL, CodecDecoderConfig
from vllm_omni.models.qwen3_tts.codec.convolution import CausalConv
from vllm_omni.models.qwen3_tts.codec.state import Carrying, CodecState, fresh_state
from vllm_omni.models.qwen3_tts.codec.transformer import WindowTransformer

FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}
ENCODER_ONLY = tuple(f"quantizer.rvq_{half}.input_proj." for half in ("first", "rest"))
CONSTANTS = ("rotary_emb.inv_freq", "code_offset")


class CodecDecoder(nn.Module):
    """Made on the meta device; `load` fills it."""

    def __init__(self, config: CodecDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.codebooks = ResidualCodebooks(config) if config.has_residual_codes else SummedCodebooks(config)
        if config.has_residual_codes:
            self.pre_conv = CausalConv(config.codebook_dim, config.latent_dim, FIRST_KERNEL)
        self.pre_transformer = WindowTransformer(config)
        self.upsample = nn.ModuleList(FeatureUpsampling(config.latent_dim, ratio) for ratio in config.upsampling_ratios)
        first, *_, last = config.channels
        self.decoder = nn.ModuleList(
            [
                CausalConv(config.latent_dim, first, EDGE_KERNEL),
                *(SampleUpsampling(config, index) for index in range(len(config.upsample_rates))),
                Snake(last),
                CausalConv(last, 1, EDGE_KERNEL),
            ]
        )
        self.carrying: dict[str, Carrying] = {}
        for name, module in self.named_modules():
            if isinstance(module, Carrying) and 0 not in module.carried_shape:
                module.key = name
                self.carrying[name] = module

    @classmethod
    def load(
        cls,
        config: CodecDecoderConfig,
        folder: Path,
        prefix: str,
        device: torch.device,
        dtype: torch.dtype,
        variant: str | None = None,
    ) -> CodecDecoder:
        """With the tensors of `folder` whose names begin with the prefix."""
        with on_meta_device():
            decoder = cls(config)
        allocate(decoder, device, dtype)
        give_memory(decoder.codebooks, device)
        decoder.codebooks.float()
        load_weights(_Published(decoder, prefix), folder, prefix, variant)
        decoder.codebooks.finish(dtype)
        return decoder

    @torch.inference_mode()
    def forward(self, codes: Tensor, state: CodecState, *, is_first: bool) -> Tensor:
        """codes: [B, n, Q] int64; state: of B rows, replaced by the next frame's; is_first: whether the rows begin (all
        do, or none) -> [B, samples] from -1 to 1.
        """
        x = self.codebooks(codes)
        x = self.pre_conv(x, state) if self.config.has_residual_codes else x
        x = self.pre_transformer(x, state)
        for part in self.upsample:
            x = part(x, state, is_first=is_first)
        first, *blocks, act, last = self.decoder
        x = first(x, state)
        for block in blocks:
            x = block(x, state, is_first=is_first)
        return last(act(x), state)[:, :, 0].clamp_(-1, 1)

    def begin(self, num_rows: int) -> CodecState:
        """The state before the first frame."""
        weight = self.pre_transformer.norm.weight
        return fresh_state(self.carrying, num_rows, weight.device, weight.dtype)

    def locate(self, name: str) -> Target | None:
        """Published name, without the prefix, -> parameter (see layers/weights.py)."""
        found = self.codebooks.locate(name)
        if found is not None:
            return Target(f"codebooks.{found.parameter}", found.rows)
        owner, _, kind = name.rpartition(".")
        owner = owner.removesuffix(".conv")
        parent, _, last = owner.rpartition(".")
        if last not in FUSED:
            return Target(f"{owner}.{kind}")
        fused = f"{parent}.{FUSED[last]}"
        layers = dict(self.named_modules())
        return Target(f"{fused}.{kind}", layers[fused].rows(last)) if fused in layers else None

    def is_ignored(self, name: str) -> bool:
        return name.startswith(ENCODER_ONLY) or name.endswith(CONSTANTS)


class _Published(nn.Module):
    """The decoder under the prefix that its tensors have in a folder."""

    def __init__(self, decoder: CodecDecoder, prefix: str) -> None:
        super().__init__()
        self.decoder, self._prefix = decoder, prefix

    def locate(self, name: str) -> Target | None:
        target = self.decoder.locate(name.removeprefix(self._prefix))
        return None if target is None else Target(f"decoder.{target.parameter}", target.rows)

    def is_ignored(self, name: str) -> bool:
        return self.decoder.is_ignored(name.removeprefix(self._prefix))
