"""The JSON files of a published ACE-Step 1.5 folder (diffusers' AceStepPipeline), each read once. Knows no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_omni.errors import ConfigError
from vllm_omni.utils.checks import check_number
from vllm_omni.utils.files import read_json

PIPELINE = "AceStepPipeline"


class AceStepFolder:
    """Reads `model_index.json` when it is made and a part's configuration when it is first asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._index = read_json(path / "model_index.json")
        self._configs: dict[Path, dict[str, Any]] = {}
        pipeline = self._index.get("_class_name")
        if pipeline != PIPELINE:
            raise ConfigError(f"model: got a folder of {pipeline!r}, expected one of {PIPELINE!r}")

    def has_part(self, part: str) -> bool:
        """Whether the index names it; some parts are optional."""
        return (self._index.get(part) or [None])[0] is not None

    def config_file(self, part: str) -> Path:
        return self.path / part / ("scheduler_config.json" if part == "scheduler" else "config.json")

    def config(self, part: str) -> dict[str, Any]:
        file = self.config_file(part)
        if file not in self._configs:
            self._configs[file] = read_json(file)
        return self._configs[file]

    def count(self, part: str, key: str) -> int:
        """An integer of at least 1 from the configuration of a part."""
        value: Any = self.config(part).get(key)
        check_number(f"{self.config_file(part)}: {key}", value, 1, integer=True, raises=ConfigError)
        return int(value)
