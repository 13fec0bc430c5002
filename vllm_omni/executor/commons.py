"""What the executors of one loop have in common."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_omni.executor.process.hosts import Hosts
from vllm_omni.executor.process.segments import Segments
from vllm_omni.executor.ray.cluster import RayCluster
from vllm_omni.executor.wake import Wake


@dataclass(frozen=True, slots=True)
class Commons:
    """Owned by the loop."""

    wake: Wake = field(default_factory=Wake)  # to be called when there is something to poll; waits on connections
    cluster: RayCluster = field(default_factory=RayCluster)  # where actors run; connects when one is started
    hosts: Hosts = field(default_factory=Hosts)  # processes of stages, which some share
    segments: Segments = field(default_factory=Segments)  # a tensor of one process goes on to another without a copy

    def close(self) -> None:
        """After the last executor was shut down; may be called twice."""
        self.segments.clear()
        self.cluster.close()
        self.wake.close()
