"""Whether all stages fit into memory, worked out before any weights are loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import device as Device

from vllm_omni.config.schema import OmniConfig
from vllm_omni.core.routing.budgets import GIB, MIB, MemoryBudget
from vllm_omni.engine.base import MemoryPlan
from vllm_omni.executor.homes import Home, home_of
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.utils.device import free_memory_bytes, rank_device, resolve_device, total_memory_bytes

PROMPT_CACHE = "prompt-embedding cache"
SHARE_OF_FREE_MEMORY = 0.5  # that is planned for unasked, where other programs use the same memory
HOST = Device("cpu")
FIX_HOST = "remove `offload: weights` from a stage, or quantise its weights"
LESS = "plan less: a smaller KV pool (a stage's kv_memory_mb, max_model_len), dit_cache.max_memory_mb, bfloat16"
FIX_TOTAL = f"raise resources.max_memory_gb, or {LESS}"
FIX_DEVICE = f"raise resources.max_gpu_utilization, or {LESS}"


def plan_memory(pipeline: Pipeline) -> dict[str, MemoryPlan]:
    """Stage -> what its replicas will hold together. Weights that stages of one kind, or replicas, share (folder,
    device, dtype) count once. What is left then is granted to the stages that could use more, the same to each replica.
    """
    plans = _plans(pipeline)
    wanted = {name: plan.wanted_bytes for name, plan in plans.items() if plan.wanted_bytes}
    if not wanted:
        return plans
    for name, num_bytes in _grants(pipeline.config, plans, wanted).items():
        pipeline.grant_memory(name, num_bytes)
    return _plans(pipeline)


def _plans(pipeline: Pipeline) -> dict[str, MemoryPlan]:
    plans: dict[str, MemoryPlan] = {}
    homes: dict[tuple[str, ...], set[Home | None]] = {}  # weights -> the processes, or first ranks, that have them
    for name, spec in pipeline.specs.items():
        plan, replicas = spec.plan_memory(), list[MemoryPlan]()
        for number, device in enumerate(map(resolve_device, spec.stage.replica_devices)):
            key = (*spec.weights_key(), str(device), spec.precision.name, spec.stage.offload)
            loaded = homes.setdefault(key, set())
            home = ("ranks", name, number) if spec.stage.parallel.size > 1 else home_of(spec.stage, number)
            replica = plan
            if home in loaded:
                replica = dataclasses.replace(plan, weights_bytes=0, offloaded_bytes=0)
            elif loaded:
                remark = "its weights are loaded once more, since neither processes nor ranks share any"
                replica = dataclasses.replace(plan, remark=f"{plan.remark}; {remark}" if plan.remark else remark)
            loaded.add(home)
            replicas.append(replica)
        plans[name] = _sum(replicas)
    return plans


def _sum(plans: Sequence[MemoryPlan]) -> MemoryPlan:
    """Of the replicas of one stage."""
    sizes = [field.name for field in dataclasses.fields(MemoryPlan) if field.name not in ("num_ranks", "remark")]
    return dataclasses.replace(plans[-1], **{name: sum(getattr(plan, name) for plan in plans) for name in sizes})


def _grants(config: OmniConfig, plans: Mapping[str, MemoryPlan], wanted: Mapping[str, int]) -> dict[str, int]:
    """Stage -> what each of its replicas gets of what the budget, and the free memory of its device, leave; the stages
    that want least are served first, so that none gets less than an equal part for the sake of another.
    """
    embeds_bytes = int(config.dit_cache.prompt_embeds_mb * MIB)
    left = int(config.max_memory_gb * GIB) - sum(plan.total_bytes for plan in plans.values()) - embeds_bytes
    by_device = _by_device(config)
    left_on = {
        device: _usable_bytes(config, device) - sum(_on_device(config, plans, name, device) for name in counts)
        for device, counts in by_device.items()
    }
    grants: dict[str, int] = {}
    waiting = sorted(wanted, key=lambda name: (wanted[name], name))
    for number, name in enumerate(waiting):
        stage, num_replicas = config.stages[name], config.stages[name].replicas
        counts_on = {device: counts[name] for device, counts in by_device.items() if name in counts}
        shares = [left // (len(waiting) - number) // num_replicas]
        for device, count in counts_on.items():  # where each rank has an equal part of what its replica is granted
            rivals = [other for other in waiting[number:] if other in by_device[device]]
            shares.append(left_on[device] // len(rivals) * stage.parallel.size // count)
        grants[name] = max(min(wanted[name] // num_replicas, *shares), 0)
        left -= grants[name] * num_replicas
        for device, count in counts_on.items():
            left_on[device] -= grants[name] * count // stage.parallel.size
    return grants


def _usable_bytes(config: OmniConfig, device: Device) -> int:
    """What may be planned for on a device beside what others hold there."""
    is_shared = total_memory_bytes(device) is None
    share = SHARE_OF_FREE_MEMORY if is_shared else config.max_gpu_utilization
    return int(share * free_memory_bytes(device))


def reserve_memory(config: OmniConfig, plans: Mapping[str, MemoryPlan]) -> MemoryBudget:
    """Reserves every stage's share of `max_memory_gb`; ResourceError when that, or an accelerator, is too small."""
    budget = MemoryBudget(int(config.max_memory_gb * GIB), "resources.max_memory_gb", FIX_TOTAL)
    shares = {name: plan.total_bytes for name, plan in plans.items()}  # of all ranks
    waiting = {name: plan.offloaded_bytes for name, plan in plans.items() if plan.offloaded_bytes}
    if waiting:
        MemoryBudget(free_memory_bytes(HOST), "free memory of the host", FIX_HOST).reserve_all(waiting)
    budget.reserve_all({**shares, PROMPT_CACHE: int(config.dit_cache.prompt_embeds_mb * MIB)})
    for device, counts in _by_device(config).items():
        total = total_memory_bytes(device)
        if total is not None:
            on_device = MemoryBudget(int(config.max_gpu_utilization * total), f"memory of {device}", FIX_DEVICE)
            on_device.reserve_all({name: _on_device(config, plans, name, device) for name in counts})
    return budget


def _on_device(config: OmniConfig, plans: Mapping[str, MemoryPlan], name: str, device: Device) -> int:
    """The part of a stage's plan that is on one of its devices: each has the weights once."""
    by_device = {each: counts[name] for each, counts in _by_device(config).items() if name in counts}
    plan = plans[name]
    weights = plan.weights_bytes * plan.num_ranks
    rest = plan.total_bytes - weights
    return weights // len(by_device) + rest * by_device[device] // sum(by_device.values())


def _by_device(config: OmniConfig) -> dict[Device, dict[str, int]]:
    """Device -> how many ranks of the replicas of each stage are there."""
    grouped: dict[Device, dict[str, int]] = {}
    for name, stage in config.stages.items():
        for first in map(resolve_device, stage.replica_devices):
            for rank in range(stage.parallel.size):
                counts = grouped.setdefault(rank_device(first, rank), {})
                counts[name] = counts.get(name, 0) + 1
    return grouped
