"""Stages as actors of a real Ray: words, sound and pictures are those of one process; actors and nodes that die fail
their tasks with the cause and are replaced. Everything about Ray is here, since it takes seconds to start.
"""

from __future__ import annotations

import dataclasses
import os
import re
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import support.apart_stages  # noqa: F401
import torch
from support.driver import Driver
from support.loop import request
from support.toy_engine import TextParams, toy_config, toy_stage

from benchmarks.hop_stages import hop_config
from vllm_omni import DiffusionParams, Omni
from vllm_omni.config.loader import load_config
from vllm_omni.config.schema import RayConfig, RayStageConfig
from vllm_omni.errors import StageError
from vllm_omni.executor.omni_executor import OmniExecutor
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.executor.ray import executor
from vllm_omni.executor.ray.remote_tensor import RemoteTensor

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="needs ray")
STORE_BYTES = 100 * 2**20
HEAL_S = 60.0  # a new actor imports torch, on a machine that is busy
HOP_PLACES = {
    "source": RayStageConfig(num_cpus=0.5, resources={"worker": 0.5}),
    "sink": RayStageConfig(num_cpus=0.5, resources={"home": 1}),
}
SPOKEN = {"token2wav": DiffusionParams(seed=1)}


@pytest.fixture(scope="module", autouse=True)
def settings() -> Iterator[None]:
    """A token of its own, so that Ray writes none into the home folder; nothing is told to its makers. They are read
    when Ray is imported.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patched.setenv("RAY_AUTH_MODE", "token")
        patched.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patched.delenv("RAY_ADDRESS", raising=False)
        yield


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Here as in the processes, which share the threads of this one out: with another number sums round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three nodes: one that nothing is to happen to, and two `workers`."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 2,
            "resources": {"home": 1},
            "object_store_memory": STORE_BYTES,
            "include_dashboard": False,
            "_system_config": {"health_check_period_ms": 500, "health_check_failure_threshold": 3},
        },
    )
    for _ in range(2):
        cluster.add_node(num_cpus=1, resources={"worker": 1}, object_store_memory=STORE_BYTES)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def driver(cluster: Cluster) -> Iterator[Driver]:
    """One stage, on one of the workers."""
    driver = Driver(loop_of(cluster, ray=RayStageConfig(num_cpus=0.5, resources={"worker": 0.5}), step_s=0.01))
    yield driver
    driver.loop.shutdown()
    import ray

    assert not ray.is_initialized()
    assert all(node.live_processes() for node in cluster.list_all_nodes()), "a Ray that was there goes on"


def loop_of(cluster: Cluster, **options: Any) -> OmniExecutor:
    stages = {"text": toy_stage("text", "apart_text", executor="ray", **options)}
    return OmniExecutor(Pipeline(toy_config(stages=stages, outputs=("text",), ray=RayConfig(address=cluster.address))))


def same_threads() -> str:
    """An override: actors compute with as many threads as this process, as sums round otherwise with another number."""
    return f"resources.threads={torch.get_num_threads()}"


def place(driver: Driver) -> dict[str, Any]:
    return driver.loop.get_status()["stages"]["text"]


def descendants(pid: int) -> set[int]:
    """Of a process, zombies left out."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found |= {child, *descendants(child)}
    return found


def test_speech_streams_between_actors_of_a_ray_that_is_started_and_ended() -> None:
    def speak(omni: Omni) -> list[Any]:
        parts = list(omni.stream("can you read out: two red stars?", SPOKEN))
        assert parts[-1].error is None, parts[-1].error
        pieces = [piece.samples for part in parts[:-1] for piece in part.audios]
        (whole,) = parts[-1].audios
        assert len(pieces) > 1 and np.array_equal(np.concatenate(pieces, axis=1), whole.samples)
        return [parts[-1].text, parts[-1].token_ids, whole.samples.tobytes(), [piece.shape for piece in pieces]]

    before = descendants(os.getpid())
    actors = [same_threads(), "ray.address=local", *(f"{stage}.executor=ray" for stage in ("talker", "token2wav"))]
    actors += [f"{stage}.ray.num_cpus=0.5" for stage in ("talker", "token2wav")]
    with (
        Omni("tiny_speech", progress=False, dtype="float32") as inline,
        Omni("tiny_speech", progress=False, dtype="float32", overrides=actors) as apart,
    ):
        assert speak(inline) == speak(apart)
        assert len({stage.get("pid") for stage in apart.get_status()["stages"].values()}) == 3
    import ray

    assert not ray.is_initialized()
    until = time.monotonic() + 10
    while descendants(os.getpid()) - before:
        assert time.monotonic() < until, "Ray has left processes behind"
        time.sleep(0.05)


def test_pictures_are_those_of_one_process(cluster: Cluster) -> None:
    """The Ray that runs here is found without an address; what the request brings passes through its object store."""
    given = np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8)
    params = DiffusionParams(seed=3, num_inference_steps=4, strength=0.5)
    found = []
    for overrides in ([], [same_threads(), "image.executor=ray"]):
        with Omni("tiny_scene", progress=False, dtype="float32", overrides=overrides) as omni:
            (output,) = omni.generate({"prompt": "a violet star", "image": given}, params)
            assert output.error is None
            found.append(np.asarray(output.images[0]).tobytes())
    assert found[0] == found[1]


def test_what_keeps_an_actor_from_starting_is_said(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        StageError, match=r"its actor \(process \d+ on .*\) could not load it: RuntimeError: weights are on fire"
    ):
        loop_of(cluster, fails_to_load=True)
    monkeypatch.setattr(executor, "START_S", 0.5)
    asks = RayStageConfig(num_cpus=0.5, resources={"gold": 1})
    words = "did not start within 0.5 s; it asks for {'CPU': 0.5, 'gold': 1}, and the cluster has {'CPU': "
    with pytest.raises(StageError, match=re.escape(words)):
        loop_of(cluster, ray=asks)


def test_what_goes_wrong_in_an_actor_fails_its_tasks_alone(driver: Driver, caplog: pytest.LogCaptureFixture) -> None:
    first = place(driver)
    raised = driver.answer(request("raises", params=TextParams(do="raise")))
    assert "RuntimeError: boom" in str(raised.error)
    assert isinstance(raised.error.__cause__, RuntimeError) and "toy_engine.py" in str(raised.error.__cause__.__cause__)
    assert driver.answer(request("logs", "do=log")).error is None and "text: step of logs" in caplog.text
    odd = driver.answer(request("odd", "do=odd"))
    assert "got a builtins.object, which cannot be sent to another process" in str(odd.error)
    asked = request("bad", [{"role": "user", "content": [{"type": "text", "text": "x", "more": open}]}])
    assert "cannot be sent to another process" in str(driver.answer(asked).error)
    assert driver.answer(request("good", "x")).text == "xx"
    assert place(driver)["pid"] == first["pid"]


def test_aborts_free_what_the_actor_holds(driver: Driver) -> None:
    for number in range(20):
        driver.loop.add_request(request(f"a{number}", params=TextParams(steps=1000)))
        driver.outputs += driver.loop.step()
        driver.loop.abort(f"a{number}")
    driver.loop.take_outputs()
    driver.outputs.clear()
    assert driver.answer(request("a0", "x")).text == "xx", "an id can be used again"
    driver.loop.check_integrity()


@pytest.fixture(scope="module")
def hops(cluster: Cluster) -> Iterator[Driver]:
    """A stage that gives bytes, on one of the workers, and one beside the loop that counts them."""
    config = load_config(hop_config("ray"), [f"ray.address={cluster.address}"])
    stages = {name: dataclasses.replace(stage, ray=HOP_PLACES[name]) for name, stage in config.stages.items()}
    driver = Driver(OmniExecutor(Pipeline(dataclasses.replace(config, stages=stages))))
    yield driver
    driver.loop.shutdown()


def test_tensors_pass_from_actor_to_actor_and_the_loop_sees_none(hops: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(tensor: RemoteTensor) -> Any:
        raise AssertionError("the loop has looked into a tensor that only actors read")

    monkeypatch.setattr(RemoteTensor, "here", never)
    for number in range(2):  # the second time the same memory is given once more
        output = hops.answer(request(f"hop{number}", str(1 << 20)))
        assert output.error is None and output.tensors["sink.bytes"].item() == 1 << 20


def test_what_is_gone_with_its_node_is_made_again(hops: Driver, cluster: Cluster) -> None:
    """The reader of a tensor is being restarted when the node dies that holds the only copy."""
    source = hops.loop.get_status()["stages"]["source"]
    hops.loop.restart_stage("sink")
    hops.until(lambda: hops.loop.get_status()["stages"]["sink"]["state"] == "restarting")
    hops.loop.add_request(request("lost", str(1 << 20)))
    hops.until(lambda: hops.loop.find("lost").done == ("source",))
    cluster.add_node(num_cpus=1, resources={"worker": 1}, object_store_memory=STORE_BYTES)
    (node,) = [node for node in cluster.worker_nodes if node.node_id == source["node"]]
    cluster.remove_node(node, allow_graceful=False)
    assert hops.loop.get_status()["stages"]["sink"]["tasks"] == 1
    hops.until(lambda: hops.final("lost"), HEAL_S)
    output = hops.final("lost")
    assert output is not None and output.error is None and output.tensors["sink.bytes"].item() == 1 << 20
    assert hops.loop.get_status()["stages"]["source"]["node"] != source["node"]
    hops.loop.check_integrity()


def heals(driver: Driver, name: str, kill: Callable[[], object]) -> str:
    """A task whose actor is killed while its words stream: all come, none twice. What was said of the actor's end."""
    driver.outputs.clear()
    driver.loop.add_request(request(name, "x", params=TextParams(steps=100)), stream=True)
    driver.until(lambda: len(driver.outputs) > 2, HEAL_S)
    kill()
    driver.longest_s = 0.0
    driver.until(lambda: place(driver)["state"] == "rebuilding", HEAL_S)
    cause = place(driver)["cause"]
    driver.until(lambda: driver.final(name), HEAL_S)
    output = driver.final(name)
    assert output is not None and output.error is None and output.text == "x" * 100
    assert "".join(part.text or "" for part in driver.outputs if not part.finished) == output.text
    assert output.metrics["text"]["retried"] == 1 and driver.longest_s < 1.0, "the loop waits for nobody"
    return str(cause)


def test_an_actor_that_is_killed_is_replaced_and_its_tasks_go_on(driver: Driver) -> None:
    first = place(driver)
    words = heals(driver, "killed", lambda: os.kill(first["pid"], signal.SIGKILL))
    assert f"its actor (process {first['pid']} on {first['host']}) has ended: The actor died unexpectedly" in words
    assert place(driver)["pid"] != first["pid"]


def test_a_stage_whose_node_dies_is_rebuilt_on_another(driver: Driver, cluster: Cluster) -> None:
    first = place(driver)
    (node,) = [node for node in cluster.worker_nodes if node.node_id == first["node"]]
    words = heals(driver, "lost", lambda: cluster.remove_node(node, allow_graceful=False))
    assert f"on {first['host']}) has ended" in words and place(driver)["node"] != first["node"]
    assert driver.answer(request("next", "x")).text == "xx"
