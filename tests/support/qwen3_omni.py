"""A tiny random Qwen3-Omni checkpoint in the published format, and prompts with media for it and for transformers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from support.speech import SPECIAL, save_processor
from torch import Tensor
from transformers import Qwen3OmniMoeConfig, Qwen3OmniMoeForConditionalGeneration

from vllm_omni.worker.ar.media_prompt import MediaItem, MediaPrompt, content_ids_of
from vllm_omni.worker.ar.media_reading.spans import MediaClock, MediaSpan, rope_index

ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
TOKENS = dict(
    audio_token_id=SPECIAL["audio"],
    image_token_id=SPECIAL["image"],
    video_token_id=SPECIAL["video"],
    audio_start_token_id=SPECIAL["audio_bos"],
    audio_end_token_id=SPECIAL["audio_eos"],
    vision_start_token_id=106,
    vision_end_token_id=107,
    position_id_per_seconds=13,
    seconds_per_chunk=2,
)
DECODER = dict(
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=1024,
    rope_parameters={**ROPE, "interleaved": True},
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    norm_topk_prob=True,
)
THINKER = dict(
    **TOKENS,
    text_config={**DECODER, "vocab_size": 128, "num_hidden_layers": 4, "num_experts": 6},
    vision_config=dict(
        depth=3,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        patch_size=4,
        out_hidden_size=32,
        num_position_embeddings=16,
        deepstack_visual_indexes=[0, 1],
    ),
    audio_config=dict(
        num_mel_bins=16,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=48,
        d_model=32,
        n_window=50,
        n_window_infer=100,
        downsample_hidden_size=8,
        output_dim=32,
    ),
    user_token_id=105,
)
NUM_CODES, NUM_GROUPS = 40, 4
CODEC_EOS = NUM_CODES + 4
TALKER = dict(
    **TOKENS,
    text_config={
        **DECODER,
        "hidden_size": 24,
        "vocab_size": NUM_CODES + 1024,
        "num_hidden_layers": 2,
        "num_local_experts": 5,
        "shared_expert_intermediate_size": 20,
    },
    code_predictor_config=dict(
        vocab_size=NUM_CODES,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_code_groups=NUM_GROUPS,
    ),
    num_code_groups=NUM_GROUPS,
    thinker_hidden_size=32,
    accept_hidden_layer=3,
    spatial_merge_size=2,
    codec_pad_id=NUM_CODES + 1,
    codec_bos_id=NUM_CODES + 2,
    codec_nothink_id=NUM_CODES + 5,
    codec_think_bos_id=NUM_CODES + 6,
    codec_think_eos_id=NUM_CODES + 7,
    codec_eos_token_id=CODEC_EOS,
    speaker_id={"chelsie": NUM_CODES + 10, "ethan": NUM_CODES + 11},
)
CODE2WAV = dict(
    codebook_size=NUM_CODES,
    hidden_size=32,
    num_attention_heads=2,
    num_key_value_heads=2,
    sliding_window=6,
    intermediate_size=48,
    num_hidden_layers=2,
    num_quantizers=NUM_GROUPS,
    upsample_rates=[3, 2],
    upsampling_ratios=[2, 2],
    decoder_dim=16,
)
MARKS = dict(  # of the character tokenizer: <|im_start|>, and "s", "u", "a" for the roles
    im_start_token_id=96,
    im_end_token_id=97,
    system_token_id=84,
    user_token_id=86,
    assistant_token_id=66,
    tts_pad_token_id=112,
    tts_bos_token_id=113,
    tts_eos_token_id=114,
)


def tiny_config(**changes: Any) -> Qwen3OmniMoeConfig:
    given = {"thinker_config": THINKER, "talker_config": TALKER, "code2wav_config": CODE2WAV, **MARKS}
    return Qwen3OmniMoeConfig(**{**given, **changes})


def tiny_reference(seed: int = 0, config: Qwen3OmniMoeConfig | None = None) -> Qwen3OmniMoeForConditionalGeneration:
    """transformers' model with random weights large enough to make different inputs give different tokens."""
    torch.manual_seed(seed)
    model = Qwen3OmniMoeForConditionalGeneration(config or tiny_config()).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0, 0].numel() if "experts" in name else parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
            elif name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def save_tiny_qwen3_omni(folder: Path, seed: int = 0, config: Qwen3OmniMoeConfig | None = None) -> Path:
    """Weights in several shards, config.json and the processor."""
    tiny_reference(seed, config).save_pretrained(folder, max_shard_size="200KB")
    return save_processor(folder)


@cache
def meta_thinker() -> Any:
    """The reference thinker without weights, for its positions."""
    from transformers import Qwen3OmniMoeThinkerForConditionalGeneration

    with torch.device("meta"):
        return Qwen3OmniMoeThinkerForConditionalGeneration(tiny_config().thinker_config)


CLOCK = MediaClock(13, is_continuous=True)


@dataclass
class Case:
    """A prompt for both sides: ours, and the arguments of the reference's generate."""

    token_ids: list[int]
    placed: list[tuple[int, MediaSpan]] = field(default_factory=list)
    items: list[MediaItem] = field(default_factory=list)
    theirs: dict[str, Any] = field(default_factory=dict)

    def prompt(self) -> MediaPrompt:
        positions, delta = rope_index(len(self.token_ids), self.placed, CLOCK)
        content = content_ids_of(self.token_ids, self.items)
        return MediaPrompt(self.token_ids, content, positions, delta, tuple(self.items))


def make_case(kinds: str, seed: int = 0, before: Iterable[int] = (5, 6, 7), after: Iterable[int] = (8, 9)) -> Case:
    """kinds: letters of image, audio, video, and t for a video with its sound track, in order."""
    generator = torch.Generator().manual_seed(seed)
    case = Case(list(before), theirs={"use_audio_in_video": True} if "t" in kinds else {})
    for kind in kinds:
        {"i": _add_image, "a": _add_audio, "v": _add_video, "t": _add_track}[kind](case, generator)
        case.token_ids += [20 + seed, 21]
    case.token_ids += after
    return case


def _place(case: Case, span: MediaSpan, inputs: dict[str, dict[str, Tensor]]) -> None:
    around = (SPECIAL["audio_bos"], SPECIAL["audio_eos"]) if span.kind == "audio" else (106, 107)
    case.token_ids.append(around[0])
    start = len(case.token_ids)
    kinds = [kind for kind, positions in span.pieces(CLOCK) for _ in range(positions.shape[1])]
    kinds = ["audio_bos", *kinds, "audio_eos"] if span.has_track else kinds
    case.placed.append((start, span))
    case.token_ids += [*(SPECIAL[kind] for kind in kinds), around[1]]
    for kind, own in inputs.items():
        places = torch.tensor([start + offset for offset, found in enumerate(kinds) if found == kind])
        case.items.append(MediaItem(kind, places, own))


def _join(case: Case, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        case.theirs[name] = torch.cat([case.theirs[name], tensor]) if name in case.theirs else tensor


def _add_image(case: Case, generator: torch.Generator) -> None:
    pixels, grid = torch.randn(24, 96, generator=generator), torch.tensor([1, 4, 6])
    _place(case, MediaSpan("image", (1, 2, 3)), {"image": {"pixel_values": pixels, "grid_thw": grid}})
    _join(case, pixel_values=pixels, image_grid_thw=grid[None])


def _video(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    pixels, grid, seconds = torch.randn(48, 96, generator=generator), torch.tensor([3, 4, 4]), torch.tensor(0.4)
    _join(case, pixel_values_videos=pixels, video_grid_thw=grid[None], video_second_per_grid=seconds[None])
    return {"pixel_values": pixels, "grid_thw": grid, "second_per_grid": seconds}


def _audio(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    features = torch.randn(16, 127, generator=generator)  # 13 tokens and 4
    _join(case, input_features=features[None], feature_attention_mask=torch.ones(1, 127, dtype=torch.long))
    return {"features": features}


def _add_video(case: Case, generator: torch.Generator) -> None:
    _place(case, MediaSpan("video", (3, 2, 2), 0.4), {"video": _video(case, generator)})


def _add_audio(case: Case, generator: torch.Generator) -> None:
    _place(case, MediaSpan("audio", num_audio_tokens=17), {"audio": _audio(case, generator)})


def _add_track(case: Case, generator: torch.Generator) -> None:
    inputs = {"video": _video(case, generator), "audio": _audio(case, generator)}
    _place(case, MediaSpan("video", (3, 2, 2), 0.4, 17), inputs)
