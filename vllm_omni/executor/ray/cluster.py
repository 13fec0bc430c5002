"""Where the actors of one pipeline run: connects to Ray when the first is started, and reserves room for all at once.

The resources of all stages are one placement group, packed close together, so that pipelines that start at the same
time do not take each other's last GPU and then wait for ever.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_omni.config.schema import OmniConfig, StageConfig
from vllm_omni.errors import StageError
from vllm_omni.executor.ray.connection import CONNECTION
from vllm_omni.utils.device import is_cpu, resolve_device

EXECUTOR = "ray"  # its row in the registry
NUM_THREADS = 4  # of an actor: one waits for reports, others take orders
END_S = 10.0  # the most that is waited for a thread to notice that its actor was killed


@dataclass(slots=True)
class Bundle:
    """What is reserved for one actor of a stage."""

    stage: str
    is_taken: bool = False


@dataclass(frozen=True, slots=True)
class PlacedActor:
    """An actor that was started. bundle: its place in the group; None: it asked for nothing, or is alone."""

    handle: Any
    bundle: Bundle | None


class RayCluster:
    """Of one loop. Executors run their threads here, so that none uses a connection that is closed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._is_connected = False
        self._is_closed = False
        self._group: Any = None
        self._bundles: list[Bundle] = []

    def run(self, work: Callable[[], None], name: str) -> threading.Thread:
        """A thread, started. Called by the loop alone, which waits for no lock that is held while Ray starts."""
        thread = threading.Thread(target=work, name=name, daemon=True)
        thread.start()
        self._threads = [each for each in self._threads if each.is_alive()] + [thread]
        return thread

    def start(self, config: OmniConfig, stage: StageConfig) -> PlacedActor:
        """An actor for the stage, on its way. StageError where there is no Ray."""
        with self._lock:
            if self._is_closed:
                raise StageError(f"stage {stage.name!r}: shut down")
            if not self._is_connected:
                CONNECTION.enter(config.ray)
                self._is_connected = True
                self._reserve(config)
            bundle = next((each for each in self._bundles if each.stage == stage.name and not each.is_taken), None)
            handle = self._start(stage, bundle)
            if bundle is not None:
                bundle.is_taken = True
        return PlacedActor(handle, bundle)

    def end(self, actor: PlacedActor) -> None:
        """Kills it; its place is free again."""
        import ray

        if ray.is_initialized():  # else somebody else has ended the connection, and the actor with it
            ray.kill(actor.handle, no_restart=True)
        if actor.bundle is not None:
            actor.bundle.is_taken = False

    def close(self) -> None:
        """After the last executor was shut down; may be called twice."""
        with self._lock:
            self._is_closed = True
        for thread in self._threads:
            thread.join(END_S)
        if not self._is_connected:
            return
        self._is_connected = False
        import ray

        if self._group is not None and ray.is_initialized():
            ray.util.remove_placement_group(self._group)
        CONNECTION.exit()

    def _reserve(self, config: OmniConfig) -> None:
        """Returns at once; who finds no room shows by its actors that do not start."""
        from ray.util import placement_group

        stages = [stage for stage in config.stages.values() if stage.executor == EXECUTOR and resources_of(stage)]
        replicas = [stage for stage in stages for _ in range(stage.replicas)]
        if len(replicas) > 1:
            self._bundles = [Bundle(stage.name) for stage in replicas]
            self._group = placement_group([resources_of(stage) for stage in replicas], strategy="PACK")

    def _start(self, stage: StageConfig, bundle: Bundle | None) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        from vllm_omni.executor.ray.actor import StageActor

        options: dict[str, Any] = {}
        if bundle is not None:
            place = PlacementGroupSchedulingStrategy(self._group, self._bundles.index(bundle))
            options["scheduling_strategy"] = place
        kind = ray.remote(StageActor).options(
            num_cpus=stage.ray.num_cpus,
            num_gpus=num_gpus_of(stage),
            resources=dict(stage.ray.resources),
            max_concurrency=NUM_THREADS,
            max_restarts=0,
            **options,
        )
        return kind.remote(stage.name)


def num_gpus_of(stage: StageConfig) -> float:
    """What its actor is given: unasked, one for each rank where it computes on a GPU."""
    if stage.ray.num_gpus is not None:
        return stage.ray.num_gpus
    return 0.0 if is_cpu(resolve_device(stage.device)) else float(stage.parallel.size)


def resources_of(stage: StageConfig) -> dict[str, float]:
    """As Ray names them; without those of which it asks for none."""
    asked = {"CPU": stage.ray.num_cpus, "GPU": num_gpus_of(stage), **stage.ray.resources}
    return {name: amount for name, amount in asked.items() if amount}
