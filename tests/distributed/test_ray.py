"""Stages as actors of a real Ray of three nodes: actors and nodes that die fail their tasks with the cause and are
replaced. That pipelines make on Ray what they make elsewhere is shown with the other executors.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest
import support.apart_stages  # noqa: F401
from support.driver import Driver
from support.loop import request
from support.toy_engine import TextParams, toy_config, toy_stage

from benchmarks.hop_stages import hop_config
from vllm_omni.config.loader import load_config
from vllm_omni.config.schema import RayConfig, RayStageConfig
from vllm_omni.errors import StageError
from vllm_omni.executor.omni_executor import OmniExecutor
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.executor.ray import executor
from vllm_omni.executor.ray.remote_tensor import RemoteTensor

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

pytestmark = [
    pytest.mark.skipif(find_spec("ray") is None, reason="needs ray"),
    pytest.mark.usefixtures("one_thread"),
]
STORE_BYTES = 100 * 2**20
HEAL_S = 60.0  # a new actor imports torch, on a machine that is busy
HOP_PLACES = {
    "source": RayStageConfig(num_cpus=0.5, resources={"worker": 0.5}),
    "sink": RayStageConfig(num_cpus=0.5, resources={"home": 1}),
}


@pytest.fixture(scope="module")
def cluster(ray_settings: None) -> Iterator[Cluster]:
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
    """One stage, on one of the workers. The Ray that runs here is found without an address."""
    driver = Driver(loop_of(None, ray=RayStageConfig(num_cpus=0.5, resources={"worker": 0.5}), step_s=0.01))
    yield driver
    driver.loop.shutdown()
    import ray

    assert not ray.is_initialized()
    assert all(node.live_processes() for node in cluster.list_all_nodes()), "a Ray that was there goes on"


def loop_of(address: str | None, **options: Any) -> OmniExecutor:
    stages = {"text": toy_stage("text", "apart_text", executor="ray", **options)}
    return OmniExecutor(Pipeline(toy_config(stages=stages, outputs=("text",), ray=RayConfig(address=address))))


def place(driver: Driver) -> dict[str, Any]:
    return driver.loop.get_status()["stages"]["text"]


def test_what_keeps_an_actor_from_starting_is_said(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        StageError, match=r"its actor \(process \d+ on .*\) could not load it: RuntimeError: weights are on fire"
    ):
        loop_of(cluster.address, fails_to_load=True)
    monkeypatch.setattr(executor, "START_S", 0.5)
    asks = RayStageConfig(num_cpus=0.5, resources={"gold": 1})
    words = "did not start within 0.5 s; it asks for {'CPU': 0.5, 'gold': 1}, and the cluster has {'CPU': "
    with pytest.raises(StageError, match=re.escape(words)):
        loop_of(cluster.address, ray=asks)


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
        assert output.error is None and output.tensors["sink.bytes"][0] == 1 << 20


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
    assert output is not None and output.error is None and output.tensors["sink.bytes"][0] == 1 << 20
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
