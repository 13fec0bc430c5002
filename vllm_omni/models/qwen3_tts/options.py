"""The YAML keys of a `qwen3_tts_talker` stage: those of an AR stage that are not about words, and its own."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_omni.config.schema import VoicesConfig
from vllm_omni.engine.ar.options import AROptions


@dataclass(frozen=True, slots=True)
class TalkerOptions(AROptions):
    """Of a checkpoint that clones voices, where those are kept that callers may add and name; None: nowhere."""

    voices: VoicesConfig | None = None
