"""LoRA of a stage: what its spec says of the adapters that a request names (LoRASource), and which adapters the running
tasks of its engine hold (AdapterDesk).
"""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from vllm_omni.config.schema import LoRAConfig
from vllm_omni.core.diffusion.dit_cache_manager import MEGABYTE
from vllm_omni.engine.base import EngineContext
from vllm_omni.errors import CheckpointError, InvalidRequestError
from vllm_omni.layers.lora import AdapterMix
from vllm_omni.lora import LoRA
from vllm_omni.params import DiffusionParams, SamplingParams, StageParams
from vllm_omni.worker.lora.folders import LoRAFile, LoRAFolders
from vllm_omni.worker.lora.loading import load_adapter
from vllm_omni.worker.lora.plan import LoRAPlan, plan_lora
from vllm_omni.worker.lora.pool import AdapterPool
from vllm_omni.worker.lora.target import LoRATarget

MAX_PLANS = 256  # of files that were read last


def loras_of(params: StageParams) -> Sequence[LoRA]:
    """The adapters that parameters name."""
    return (params.lora or ()) if isinstance(params, SamplingParams | DiffusionParams) else ()


def without_loras(params: StageParams) -> StageParams:
    """The same without adapters."""
    return dataclasses.replace(params, lora=None) if isinstance(params, SamplingParams | DiffusionParams) else params


class LoRASource:
    """The adapters that one stage allows. Reads headers alone; safe to ask from any thread."""

    def __init__(self, config: LoRAConfig, make_target: Callable[[], LoRATarget], itemsize: Callable[[], int]) -> None:
        """make_target: called once, when an adapter is named for the first time. itemsize: of a loaded number."""
        self.config = config
        self.max_bytes = int(config.max_memory_mb * MEGABYTE)
        self._folders = LoRAFolders(config.folders)
        self._make_target = make_target
        self._itemsize = itemsize
        self._target: LoRATarget | None = None
        self._plans: OrderedDict[str, LoRAPlan] = OrderedDict()
        self._lock = threading.Lock()

    def plans(self, loras: Sequence[LoRA]) -> list[LoRAPlan]:
        """One for each; InvalidRequestError for what is not there, does not fit the model, or is too large."""
        found = [self._plan(self._folders.find(lora)) for lora in loras]
        total = sum(plan.num_bytes(self._itemsize()) for plan in found)
        if total > self.max_bytes:
            raise InvalidRequestError(
                f"lora: got {total} bytes of adapters, expected at most {self.max_bytes} (lora.max_memory_mb)"
            )
        return found

    def key(self, loras: Sequence[LoRA]) -> str | None:
        """Equal for requests whose adapters compute the same; None where they add nothing."""
        return mix_key([self._folders.find(lora) for lora in loras], loras)

    def make_pool(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> AdapterPool:
        """For the loaded model."""
        return AdapterPool(
            self.max_bytes, dtype.itemsize, partial(load_adapter, model=model, device=device, dtype=dtype)
        )

    def _plan(self, file: LoRAFile) -> LoRAPlan:
        with self._lock:
            known = self._plans.get(file.key)
            if known is None:
                self._target = self._target or self._make_target()
                try:
                    known = self._plans[file.key] = plan_lora(file, self._target, self.config.max_rank)
                except CheckpointError as error:
                    raise InvalidRequestError(f"lora: {error}") from error
            self._plans.move_to_end(file.key)
            if len(self._plans) > MAX_PLANS:
                self._plans.popitem(last=False)
            return known


def mix_key(files: Sequence[LoRAFile], loras: Sequence[LoRA]) -> str | None:
    parts = [f"{file.key}*{lora.scale!r}" for file, lora in zip(files, loras, strict=True) if lora.scale != 0]
    return ";".join(sorted(parts)) or None


class AdapterDesk:
    """Gives the tasks of one engine their adapters, first come, first served: one that finds no room beside what the
    running ones hold waits, and those behind it. Loading one is the work of a step.
    """

    def __init__(self, source: LoRASource, context: EngineContext, key: Sequence[Hashable], model: nn.Module) -> None:
        """key: of the loaded model, whose stages share the adapters where they say the same of them."""
        self._source = source
        make = partial(source.make_pool, model, context.device, context.dtype)
        self._pool: AdapterPool = context.models.adapters((*key, source.config), make)
        self._waiting: deque[tuple[str, Sequence[LoRA]]] = deque()
        self._mixes: dict[str, AdapterMix] = {}  # request id -> of those that have theirs

    @property
    def is_ready(self) -> bool:
        """Whether `admit` would do something."""
        try:
            return bool(self._waiting) and self._pool.has_room(self._source.plans(self._waiting[0][1]))
        except InvalidRequestError:
            return True

    @property
    def is_waiting(self) -> bool:
        """Whether a task is here that has not got its adapters."""
        return bool(self._waiting)

    def queue(self, request_id: str, loras: Sequence[LoRA]) -> None:
        self._waiting.append((request_id, loras))

    def admit(self) -> list[tuple[str, Exception | None]]:
        """The next tasks, which have their adapters now, each with what is wrong with them: up to the first whose
        adapters had to be loaded, as far as there is room.
        """
        num_loads, admitted = self._pool.num_loads, []
        while self._pool.num_loads == num_loads and (found := self._admit_first()) is not None:
            admitted.append(found)
        return admitted

    def _admit_first(self) -> tuple[str, Exception | None] | None:
        if not self._waiting:
            return None
        request_id, loras = self._waiting[0]
        try:
            plans = self._source.plans(loras)
            adapters = self._pool.acquire((id(self), request_id), plans)
        except Exception as error:
            self._waiting.popleft()
            return request_id, error
        if adapters is None:
            return None
        self._waiting.popleft()
        key = mix_key([plan.file for plan in plans], loras)
        if key is not None:
            parts = zip(adapters, loras, strict=True)
            mix = AdapterMix(key, tuple((adapter, lora.scale) for adapter, lora in parts if lora.scale != 0))
            self._mixes[request_id] = mix
        return request_id, None

    def mix(self, request_id: str) -> AdapterMix | None:
        """None for a task without adapters."""
        return self._mixes.get(request_id)

    def release(self, request_id: str) -> None:
        """Whether it has its adapters, waits for them, or has none."""
        self._waiting = deque(item for item in self._waiting if item[0] != request_id)
        self._mixes.pop(request_id, None)
        self._pool.release((id(self), request_id))

    def get_stats(self) -> Mapping[str, int]:
        return {f"lora_{name}": value for name, value in self._pool.get_stats().items()}

    def check_integrity(self) -> None:
        self._pool.check_integrity()
