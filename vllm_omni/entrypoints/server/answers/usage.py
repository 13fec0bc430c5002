"""Tokens of a request as OpenAI's clients count them, from the metrics of its stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_omni.entrypoints.server.models import ServedModel
from vllm_omni.params import SamplingParams
from vllm_omni.request import OmniOutput


def num_read(model: ServedModel, output: OmniOutput) -> int:
    """Tokens of the prompt: the writer's, else those of all stages that read text."""
    writer = _writer(model)
    if writer in output.metrics:
        return int(output.metrics[writer].get("prompt_tokens", 0))
    return sum(int(metrics.get("prompt_tokens", 0)) for metrics in output.metrics.values())


def num_written(model: ServedModel, output: OmniOutput) -> tuple[int, int]:
    """(tokens of text, tokens of sound)."""
    writer = _writer(model)
    text = int(output.metrics[writer].get("tokens", 0)) if writer in output.metrics else 0
    return text, sum(
        int(metrics.get("tokens", 0))
        for stage, metrics in output.metrics.items()
        if stage != writer and _samples(model, stage)
    )


def chat_usage(model: ServedModel, output: OmniOutput) -> Mapping[str, Any]:
    read = num_read(model, output)
    text, audio = num_written(model, output)
    cached = int(output.metrics.get(_writer(model), {}).get("cached_tokens", 0))
    return {
        "prompt_tokens": read,
        "completion_tokens": text + audio,
        "total_tokens": read + text + audio,
        "prompt_tokens_details": {"cached_tokens": cached, "audio_tokens": 0},
        "completion_tokens_details": {
            "audio_tokens": audio,
            "reasoning_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def media_usage(model: ServedModel, output: OmniOutput) -> Mapping[str, Any]:
    """As in answers about images and speech."""
    read, (text, audio) = num_read(model, output), num_written(model, output)
    return {"input_tokens": read, "output_tokens": text + audio, "total_tokens": read + text + audio}


def _writer(model: ServedModel) -> str:
    """'' where no stage writes words."""
    return model.abilities.writer or ""


def _samples(model: ServedModel, stage: str) -> bool:
    spec = model.pipeline.specs.get(stage)
    return spec is not None and spec.params_type is SamplingParams and spec.reads_params
