"""Whether all stages fit into memory, worked out before any weights are loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import device as Device

from vllm_omni.config.schema import OmniConfig
from vllm_omni.core.routing.budgets import GIB, MIB, MemoryBudget
from vllm_omni.engine.base import MemoryPlan
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.utils.device import resolve_device, resolve_dtype, total_memory_bytes

PROMPT_CACHE = "prompt-embedding cache"
FIX_TOTAL = "raise resources.max_memory_gb, or plan less: a smaller KV pool, dit_cache.max_memory_mb, bfloat16"
FIX_DEVICE = "raise resources.max_gpu_utilization, or plan less: a smaller KV pool, dit_cache.max_memory_mb, bfloat16"


def plan_memory(pipeline: Pipeline) -> dict[str, MemoryPlan]:
    """Stage -> what it will hold. Weights that stages of one kind share (folder, device, dtype) count once."""
    plans: dict[str, MemoryPlan] = {}
    seen: set[tuple[str, ...]] = set()
    for name, spec in pipeline.specs.items():
        plan = spec.plan_memory()
        device = resolve_device(spec.stage.device)
        key = (*spec.weights_key(), str(device), str(resolve_dtype(spec.stage.dtype, device)))
        if key in seen:
            plan = dataclasses.replace(plan, weights_bytes=0)
        seen.add(key)
        plans[name] = plan
    return plans


def reserve_memory(config: OmniConfig, plans: Mapping[str, MemoryPlan]) -> MemoryBudget:
    """Reserves every stage's share of `max_memory_gb`; ResourceError when that, or an accelerator, is too small."""
    budget = MemoryBudget(int(config.max_memory_gb * GIB), "resources.max_memory_gb", FIX_TOTAL)
    shares = {name: plan.total_bytes for name, plan in plans.items()}
    budget.reserve_all({**shares, PROMPT_CACHE: int(config.dit_cache.prompt_embeds_mb * MIB)})
    for device, names in _by_device(config).items():
        total = total_memory_bytes(device)
        if total is not None:
            on_device = MemoryBudget(int(config.max_gpu_utilization * total), f"memory of {device}", FIX_DEVICE)
            on_device.reserve_all({name: shares[name] for name in names})
    return budget


def _by_device(config: OmniConfig) -> dict[Device, list[str]]:
    grouped: dict[Device, list[str]] = {}
    for name, stage in config.stages.items():
        grouped.setdefault(resolve_device(stage.device), []).append(name)
    return grouped
