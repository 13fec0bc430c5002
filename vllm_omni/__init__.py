"""Multi-stage omni-modal inference. Public names load on first use: importing the package does not import torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_omni.entrypoints.async_omni import AsyncOmni
    from vllm_omni.entrypoints.omni import Omni
    from vllm_omni.entrypoints.state_file import read_state
    from vllm_omni.lora import LoRA
    from vllm_omni.media.audio import Audio
    from vllm_omni.media.video import Video
    from vllm_omni.params import DiffusionParams, SamplingParams
    from vllm_omni.request import OmniOutput, OmniRequest, RequestStatus, create_text_request

__version__ = "0.1.0"

_HOMES = {
    "AsyncOmni": "vllm_omni.entrypoints.async_omni",
    "Audio": "vllm_omni.media.audio",
    "DiffusionParams": "vllm_omni.params",
    "LoRA": "vllm_omni.lora",
    "Omni": "vllm_omni.entrypoints.omni",
    "OmniOutput": "vllm_omni.request",
    "OmniRequest": "vllm_omni.request",
    "RequestStatus": "vllm_omni.request",
    "SamplingParams": "vllm_omni.params",
    "Video": "vllm_omni.media.video",
    "create_text_request": "vllm_omni.request",
    "read_state": "vllm_omni.entrypoints.state_file",
}
__all__ = [
    "AsyncOmni",
    "Audio",
    "DiffusionParams",
    "LoRA",
    "Omni",
    "OmniOutput",
    "OmniRequest",
    "RequestStatus",
    "SamplingParams",
    "Video",
    "create_text_request",
    "read_state",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vllm_omni' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
