"""A voice that is taken from a recording: what the talker's prompt holds of it, and the encoders that make that."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vllm_omni.models.qwen3_tts.codec.speaker_encoder import SpeakerEncoder
from vllm_omni.models.qwen3_tts.codec.speech_encoder import SpeechEncoder

CODEC_FOLDER = "speech_tokenizer"
MAX_KEPT = 64  # voices, most recently used first; a minute of recording is 0.1 MB of codes


@dataclass(frozen=True, slots=True, eq=False)
class ClonedVoice:
    """On the encoders' device."""

    embedding: Tensor  # [D] float32, D being the talker's hidden size
    frames: Tensor | None = None  # [n, codebooks] int64, of a recording that stands in the prompt


class VoiceCloner:
    """The two encoders of a checkpoint; samples are [n] float32 at 24 kHz. What they made of a recording is kept, so
    that a voice which is used again costs nothing, whether a request names it or brings the recording again.
    """

    def __init__(self, speaker: SpeakerEncoder, speech: SpeechEncoder) -> None:
        self._speaker = speaker
        self._speech = speech
        self._kept: OrderedDict[bytes, ClonedVoice] = OrderedDict()  # by content

    @classmethod
    def load(cls, folder: Path, device: torch.device, variant: str | None) -> VoiceCloner:
        speech = SpeechEncoder.load(folder / CODEC_FOLDER, device, variant)
        return cls(SpeakerEncoder.load(folder, device, variant), speech)

    @staticmethod
    def weights_bytes(folder: Path, variant: str | None) -> int:
        """Once loaded, from the headers."""
        speech = SpeechEncoder.weights_bytes(folder / CODEC_FOLDER, variant)
        return SpeakerEncoder.weights_bytes(folder, variant) + speech

    @torch.inference_mode()
    def clone(self, samples: Tensor, has_frames: bool) -> ClonedVoice:
        """has_frames: whether the recording is to stand in the prompt."""
        key = hashlib.sha256(samples.contiguous().numpy().tobytes()).digest()
        kept = self._kept.pop(key, None)
        if kept is None or (has_frames and kept.frames is None):
            embedding = self._speaker.embed(samples) if kept is None else kept.embedding
            kept = ClonedVoice(embedding, self._speech.codes(samples) if has_frames else None)
        self._kept[key] = kept
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        return kept if has_frames else ClonedVoice(kept.embedding)
