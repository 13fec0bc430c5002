"""Pure state machines: what runs next, who holds which memory. No threads, no clock, no device."""

from vllm_omni.core.diffusion.dit_cache_manager import DiTCacheManager
from vllm_omni.core.routing.omni_scheduler import OmniScheduler

__all__ = ["DiTCacheManager", "OmniScheduler"]
