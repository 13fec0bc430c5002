"""A stage kind that speaks in voices which callers may add, for configs that a server loads: `import:
support.cloning_stages`. What it says in an added voice is that voice's reference sound; its own voice "Reader" hums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from support.toy_engine import ToyEngine, ToyOptions, ToySpec

from vllm_omni import registry
from vllm_omni.config.schema import VoicesConfig
from vllm_omni.engine.base import ReadPorts
from vllm_omni.messages import StageTask
from vllm_omni.payload import StagePayload, StageSignature, TensorSpec
from vllm_omni.request import OmniRequest
from vllm_omni.voices import SAMPLE_RATE, VoiceStore

OWN = ("Reader",)


@dataclass(frozen=True, slots=True)
class CloningOptions(ToyOptions):
    voices: VoicesConfig | None = None


class CloningEngine(ToyEngine):
    def make(self, task: StageTask) -> StagePayload:
        audio = torch.as_tensor(task.prepared)[None, None]
        return StagePayload(task.request_id, self.stage.name, {"audio": audio}, {"sample_rate": SAMPLE_RATE})


class CloningSpec(ToySpec):
    options_type = CloningOptions
    engine_type = CloningEngine
    request_keys = frozenset({"voice"})
    signature = StageSignature(outputs={"audio": TensorSpec((1, 1, "n"))}, results=frozenset({"audio"}))

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.request_choices = {"voice": OWN}
        config = self.stage.options.voices
        self.voices = None if config is None else VoiceStore(config)

    def check(self, request: OmniRequest, params: Any, reads: ReadPorts) -> Any:
        super().check(request, params, reads)
        name = request.fields.get("voice")
        if name in (None, *OWN) or self.voices is None:
            return torch.full((SAMPLE_RATE,), 0.25)
        return self.voices.get(name).sound


registry.register("stage kind", "toy_cloner", f"{__name__}:CloningSpec")
