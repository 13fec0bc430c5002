"""What is served: each model by its name, from the moment that it begins to load."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from vllm_omni.config.schema import OmniConfig
from vllm_omni.entrypoints.async_omni import AsyncOmni
from vllm_omni.entrypoints.loading import open_pipeline
from vllm_omni.entrypoints.server.http.api_error import RETRY_S, ApiError
from vllm_omni.entrypoints.server.requests.abilities import Abilities
from vllm_omni.errors import ConfigError
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.utils.checks import did_you_mean


class ServedModel:
    """One config under one name. Making it checks the config; `load` loads the weights."""

    def __init__(self, name: str, config: OmniConfig | Pipeline) -> None:
        self.name = name
        self.pipeline = open_pipeline(config)
        self.config = self.pipeline.config
        self.abilities = Abilities.of(self.pipeline)
        self.created = int(time.time())
        self._omni: AsyncOmni | None = None

    @property
    def is_loaded(self) -> bool:
        return self._omni is not None

    @property
    def omni(self) -> AsyncOmni:
        """The loaded one; ApiError 503 before."""
        if self._omni is None:
            raise ApiError(503, f"model {self.name!r} is being loaded", code="loading", retry_s=RETRY_S)
        return self._omni

    async def load(self) -> None:
        self._omni = await asyncio.to_thread(AsyncOmni, self.pipeline)

    async def shutdown(self, drain: bool) -> None:
        if self._omni is not None:
            await self._omni.shutdown(drain)

    def get_status(self) -> dict[str, Any] | None:
        """Of the loaded one, from any thread; None before."""
        return None if self._omni is None else self._omni.get_status()

    def describe(self) -> dict[str, Any]:
        """As in `/v1/models`."""
        about = {"id": self.name, "object": "model", "created": self.created, "owned_by": "vllm-omni"}
        return {**about, **self.abilities.describe()}

    def describe_graph(self) -> dict[str, Any]:
        """Its stages and edges, for whoever draws them."""
        graph, specs = self.pipeline.graph, self.pipeline.specs
        stages = [
            {
                "name": name,
                "kind": spec.stage.kind,
                "is_output": name in graph.result_stages,
                "defaults": dict(spec.defaults),
            }
            for name, spec in specs.items()
        ]
        edges = [
            {
                "source": edge.source,
                "target": edge.target,
                "port": edge.target_port,
                "is_streamed": edge.stream is not None,
            }
            for edge in graph.edges
        ]
        return {"stages": stages, "edges": edges}


class ModelTable:
    """The served models, the first being the default."""

    def __init__(self, configs: Mapping[str, OmniConfig | Pipeline]) -> None:
        if not configs:
            raise ConfigError("--config: got no config and no --model; name at least one")
        self._models = {name: ServedModel(name, config) for name, config in configs.items()}

    def __iter__(self) -> Any:
        return iter(self._models.values())

    def find(self, name: str | None) -> ServedModel:
        """The model of that name, the first one for None; ApiError 404 for an unknown one."""
        if name is None:
            return next(iter(self._models.values()))
        model = self._models.get(name)
        if model is None:
            raise ApiError(
                404, f"model: got {name!r:.80}{did_you_mean(name, self._models)}", code="model_not_found", param="model"
            )
        return model

    async def load(self) -> None:
        """One after another: loading is bound by memory and disk."""
        for model in self._models.values():
            await model.load()

    async def shutdown(self, drain: bool) -> None:
        await asyncio.gather(*(model.shutdown(drain) for model in self._models.values()))
