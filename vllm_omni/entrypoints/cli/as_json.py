"""What `--json` prints: one JSON document on stdout, for scripts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_omni.request import OmniOutput


def print_json(content: object) -> None:
    """Numbers that JSON lacks become null, and what is no plain value its text."""
    print(json.dumps(_plain(content), ensure_ascii=False, indent=2))


def output_as_json(prompt: str, output: OmniOutput) -> dict[str, Any]:
    """One answer."""
    return {
        "prompt": prompt,
        "completions": [{"text": item.text, "finish_reason": item.finish_reason} for item in output.completions],
        "status": output.status.value,
        "error": None if output.error is None else str(output.error),
        **({} if output.seed is None else {"seed": output.seed}),
    }


def answers_as_json(prompts: Sequence[str], outputs: Sequence[OmniOutput], files: Sequence[Path]) -> dict[str, Any]:
    """All answers of a call, what their stages did, and the files that were written."""
    answers = [
        {
            **output_as_json(prompt, output),
            "num_images": len(output.images),
            "num_audios": len(output.audios),
            "num_videos": len(output.videos),
            "metrics": output.metrics,
        }
        for prompt, output in zip(prompts, outputs, strict=True)
    ]
    return {"outputs": answers, "files": [str(path) for path in files]}


def _plain(value: object) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
