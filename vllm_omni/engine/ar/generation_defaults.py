"""What a checkpoint's generation_config.json says of sampling, as defaults of SamplingParams. Knows no request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.params import SamplingParams
from vllm_omni.utils.files import read_json

FILE = "generation_config.json"
# key of the file -> field of SamplingParams
FIELDS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def generation_defaults(folder: Path) -> dict[str, Any]:
    """Field -> value, nothing without the file. `do_sample: false` is temperature 0, as in transformers.

    ConfigError for a value that no sampling could use.
    """
    if not (folder / FILE).is_file():
        return {}
    content = read_json(folder / FILE)
    found = {field: content[key] for key, field in FIELDS.items() if content.get(key) is not None}
    if content.get("do_sample") is False:
        found["temperature"] = 0.0
    try:
        params = SamplingParams(**found)
    except InvalidRequestError as error:
        raise ConfigError(
            f"{folder / FILE}: {error}; correct the file, or set the stage's generation_config to ignore"
        ) from error
    return {field: getattr(params, field) for field in found}
