"""The YAML keys of a `dit` stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vllm_omni.config.builder import build
from vllm_omni.config.schema import LoRAConfig
from vllm_omni.core.diffusion.caches.base import StepCachePolicy
from vllm_omni.errors import ConfigError
from vllm_omni.registry import names, resolve
from vllm_omni.utils.checks import brief, check_number, did_you_mean


@dataclass(frozen=True, slots=True)
class DiTOptions:
    """A batch is one denoising step of several requests; a request that is larger than the bounds runs alone."""

    part: str | None = None  # which model of a transformers folder that holds several; None for a diffusers pipeline
    cache: Mapping[str, Any] = field(default_factory=dict)  # policy ("none") and the policy's own keys
    max_batch_tokens: int = 4096
    max_batch_size: int = 64
    lora: LoRAConfig | None = None  # the adapters that requests may use; None: none
    # which pictures are decoded in tiles; auto: those that memory does not suffice for
    vae_tiling: Literal["auto", "never", "always"] = "auto"

    def __post_init__(self) -> None:
        if self.part is not None and not isinstance(self.part, str):
            raise ConfigError(f"part: got {self.part!r:.80}, expected a name")
        for name in ("max_batch_tokens", "max_batch_size"):
            check_number(name, getattr(self, name), 1, integer=True, raises=ConfigError)
        self.make_policy()

    def make_policy(self) -> StepCachePolicy:
        """The step cache's policy with its options; ConfigError for what is wrong with them."""
        policy, known = self.cache.get("policy", "none"), names("step cache")
        if policy not in known:
            near = did_you_mean(policy, known) if isinstance(policy, str) else f" (known: {', '.join(known)})"
            raise ConfigError(f"cache.policy: got {brief(policy)}{near}")
        policy_type: type[StepCachePolicy] = resolve("step cache", policy)
        own = {key: value for key, value in self.cache.items() if key != "policy"}
        if own and policy_type.computes_all:
            raise ConfigError(f"cache.{next(iter(own))}: policy {policy!r} reads no keys; choose another, or leave it")
        return policy_type(build(policy_type.options_type, own, "cache"))
