"""The YAML keys of a `dit` stage."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_omni.errors import ConfigError
from vllm_omni.registry import names
from vllm_omni.utils.checks import check_number, did_you_mean


@dataclass(frozen=True, slots=True)
class StepCacheOptions:
    """policy: a row of the registry's "step cache" table. threshold: None takes the policy's own default."""

    policy: str = "none"
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.policy not in names("step cache"):
            raise ConfigError(f"policy: got {self.policy!r}{did_you_mean(self.policy, names('step cache'))}")
        if self.threshold is not None:
            if self.policy == "none":
                raise ConfigError("threshold: policy 'none' reads none; leave it out or choose another policy")
            check_number("threshold", self.threshold, 0, raises=ConfigError)


@dataclass(frozen=True, slots=True)
class DiTOptions:
    """part: which model of a transformers folder that holds several ("token2wav"); None for a diffusers pipeline's
    folder. cache: the step cache. max_batch_tokens and max_batch_size bound one denoising step's batch (a larger
    request runs alone).
    """

    part: str | None = None
    cache: StepCacheOptions = field(default_factory=StepCacheOptions)
    max_batch_tokens: int = 4096
    max_batch_size: int = 64

    def __post_init__(self) -> None:
        if self.part is not None and not isinstance(self.part, str):
            raise ConfigError(f"part: got {self.part!r:.80}, expected a name")
        for name in ("max_batch_tokens", "max_batch_size"):
            check_number(name, getattr(self, name), 1, integer=True, raises=ConfigError)
