"""What a checkpoint's generation_config.json says of the codes of a frame but the first, which are drawn apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_omni.engine.ar.generation_defaults import FILE
from vllm_omni.errors import ConfigError
from vllm_omni.layers.batched_draw import DrawSettings
from vllm_omni.models.qwen3_tts.request import SUBTALKER
from vllm_omni.utils.files import read_json
from vllm_omni.utils.plain import as_number

PUBLISHED = DrawSettings(temperature=0.9, top_k=50, top_p=1.0)  # where the file says nothing
FIRST_CODES = {  # of the first code of each frame, likewise; as SamplingParams
    "temperature": 0.9,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.05,
    "max_tokens": 2048,
    "min_tokens": 2,
}


def subtalker_settings(folder: Path) -> DrawSettings:
    """ConfigError for a value that nothing could be drawn by."""
    file = folder / FILE
    content: dict[str, Any] = read_json(file) if file.is_file() else {}
    values = {"temperature": PUBLISHED.temperature, "top_k": PUBLISHED.top_k, "top_p": PUBLISHED.top_p}
    for key, (name, most) in SUBTALKER.items():
        if content.get(key) is not None:
            where = f"{file}: {key}"
            values[name] = as_number(where, content[key], 0, most, raises=ConfigError, integer=name == "top_k")
    if content.get("subtalker_dosample") is False:
        values["temperature"] = 0.0
    return DrawSettings(**values)  # type: ignore[arg-type]
