"""Mutated stage configs: each is read, drawn and planned as `vllm-omni check` does, or refused in words."""

from __future__ import annotations

import tempfile
from pathlib import Path
from random import Random
from typing import Any

import yaml
from fuzz.mutation import mutate, mutate_text, odd_value
from support.toy_engine import register_toys

from vllm_omni.config.loader import load_config
from vllm_omni.config.shipped import shipped_configs
from vllm_omni.entrypoints.cli.graph_report import describe
from vllm_omni.executor.memory import plan_memory, reserve_memory
from vllm_omni.executor.pipeline import Pipeline

CONFIGS = ("tiny_image", "tiny_audio", "tiny_speech", "tiny_scene", "tiny_omni")


class Configs:
    """Files, mappings and overrides of the configs whose models ship."""

    def __init__(self, folder: Path | None = None) -> None:
        register_toys()
        self._folder = tempfile.TemporaryDirectory()
        self._file = Path(self._folder.name) / "config.yaml"
        self._texts = {name: path.read_text() for name, path in shipped_configs().items() if name in CONFIGS}

    def __call__(self, random: Random) -> str:
        text = self._texts[random.choice(CONFIGS)]
        config: Any = yaml.safe_load(text)
        overrides: list[str] = []
        form = random.random()
        if form < 0.5:
            config = mutate(config, random)
        elif form < 0.8:
            self._file.write_text(mutate_text(text, random), encoding="utf-8", errors="surrogateescape")
            config = self._file
        else:
            overrides = [_override(config, random) for _ in range(random.choice([1, 1, 3]))]
        pipeline = Pipeline(load_config(config, overrides))
        plans = plan_memory(pipeline)
        describe(pipeline, plans)
        reserve_memory(pipeline.config, plans)
        return "planned"

    def close(self) -> None:
        self._folder.cleanup()


def _override(config: dict[str, Any], random: Random) -> str:
    group, key = config, ""
    while isinstance(group, dict) and group and (not key or random.random() < 0.8):
        part = random.choice(list(group))
        key, group = f"{key}.{part}" if key else str(part), group[part]
    value = odd_value(random)
    as_yaml = yaml.safe_dump(value, allow_unicode=False) if _is_plain(value) else "x"
    text = random.choice([str(value), repr(value), as_yaml])
    return mutate_text(f"{key}={text}", random) if random.random() < 0.2 else f"{key}={text}"


def _is_plain(value: Any) -> bool:
    return not isinstance(value, str) or value.isprintable()
