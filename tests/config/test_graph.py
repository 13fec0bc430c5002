"""The DAG: what it derives from `inputs`, what it refuses, and properties over random graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.toy_stage import register_toys

from vllm_omni.config import StageConfig
from vllm_omni.config.graph import Edge, StageGraph
from vllm_omni.config.loader import load_config
from vllm_omni.errors import ConfigError
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.payload import DataSpec, StageSignature, TensorSpec, TextSpec

register_toys()

STATES = TensorSpec(("T", 8))
ENCODER = StageSignature(outputs={"states": STATES, "text": TextSpec()}, results=frozenset({"text"}))
PAINTER = StageSignature(
    inputs={"prompt": STATES, "negative": STATES},
    outputs={"image": TensorSpec((3, "H", "W")), "latents": TensorSpec(("N", 16))},
    required_inputs=frozenset({"prompt"}),
    results=frozenset({"image"}),
)
READER = StageSignature(
    inputs={"words": TextSpec()}, outputs={"text": TextSpec()}, required_inputs=frozenset({"words"})
)


def graph(
    stages: Mapping[str, tuple[StageSignature, Mapping[str, str]]], outputs: Sequence[str] = ("image",)
) -> StageGraph:
    configs = {name: StageConfig(name=name, kind="toy", inputs=inputs) for name, (_, inputs) in stages.items()}
    return StageGraph(configs, {name: signature for name, (signature, _) in stages.items()}, outputs)


def guided(outputs: Sequence[str] = ("image",), **inputs: str) -> StageGraph:
    """text and negative feed image, as in Z-Image."""
    edges = {"prompt": "text.states", "negative": "negative.states"} | inputs
    return graph({"image": (PAINTER, edges), "text": (ENCODER, {}), "negative": (ENCODER, {})}, outputs)


def test_edges_come_from_inputs_and_sources_come_first() -> None:
    drawn = guided()
    assert drawn.order == ("text", "negative", "image")
    assert drawn.edges_into("image") == (
        Edge("text", "states", "image", "prompt"),
        Edge("negative", "states", "image", "negative"),
    )
    assert drawn.edges_from("text") == (Edge("text", "states", "image", "prompt"),)
    assert drawn.edges_into("text") == drawn.edges_from("image") == ()


def test_a_port_is_wanted_only_when_an_edge_or_an_output_reads_it() -> None:
    drawn = guided(["image", "text", "negative.states"])
    assert drawn.wanted_ports("text") == {"states", "text"}
    assert drawn.wanted_ports("negative") == {"states"}
    assert drawn.wanted_ports("image") == {"image"}
    assert guided(["image.latents"]).wanted_ports("image") == {"latents"}
    assert drawn.result_stages == ("image", "text") and drawn.output_tensors == (("negative", "states"),)


def test_data_fits_data_of_the_same_name_and_nothing_else() -> None:
    specs = {"music": DataSpec("music"), "layout": DataSpec("layout"), "text": TextSpec(), "states": STATES}
    writer = StageSignature(outputs=specs)
    for port, spec in specs.items():
        reader = StageSignature(inputs={"in": spec}, outputs={"out": STATES}, required_inputs=frozenset({"in"}))
        for origin, offered in specs.items():
            stages = {"a": (writer, {}), "b": (reader, {"in": f"a.{origin}"})}
            if origin == port:
                (edge,) = graph(stages, ["b.out"]).edges_from("a")
                assert (edge.source_port, edge.target_port) == (port, "in")
            else:
                with pytest.raises(ConfigError) as error:
                    graph(stages, ["b.out"])
                assert all(str(word) in str(error.value) for word in ("stages.b.inputs.in", offered, spec))
    with pytest.raises(ConfigError, match=r"outputs\[0\].*data 'music'"):
        graph({"a": (writer, {})}, ["a.music"])


def test_one_port_may_feed_many_stages() -> None:
    inputs = {"prompt": "text.states"}
    drawn = graph({"text": (ENCODER, {}), "a": (PAINTER, inputs), "b": (PAINTER, inputs)}, ["a", "b"])
    assert [edge.target for edge in drawn.edges_from("text")] == ["a", "b"]
    assert drawn.order == ("text", "a", "b")


def test_a_stage_that_nobody_needs_for_this_request_does_not_run() -> None:
    neutral = guided().demand(lambda stage: frozenset({"prompt"}))
    assert neutral == {"text": frozenset(), "image": {"prompt"}}
    assert list(neutral) == ["text", "image"]
    both = guided().demand(lambda stage: frozenset({"prompt", "negative", "something unconnected"}))
    assert both == {"text": frozenset(), "negative": frozenset(), "image": {"prompt", "negative"}}


def test_a_listed_stage_runs_even_when_no_edge_is_read() -> None:
    assert set(guided(["image", "negative"]).demand(lambda stage: frozenset({"prompt"}))) == {
        "text",
        "negative",
        "image",
    }
    assert set(guided(["image", "negative.states"]).demand(lambda stage: frozenset())) == {"negative", "image"}


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: guided(prompt="txt.states"), ["stages.image.inputs.prompt", "'txt.states'", "did you mean 'text'"]),
        (lambda: guided(prompt="text.state"), ["stages.image.inputs.prompt", "no output 'state'", "mean 'states'"]),
        (
            lambda: guided(prompt="text"),
            ["stages.image.inputs.prompt: got 'text', expected '<stage>.<port>'", "text.states"],
        ),
        (lambda: guided(prompt="text."), ["no output ''", "states, text"]),
        (lambda: guided(promt="text.states"), ["stages.image.inputs.promt", "no such input", "mean 'prompt'"]),
        (lambda: guided(prompt="image.image"), ["stages.image.inputs.prompt", "its own output"]),
        (lambda: guided(prompt="text.text"), ["text.text gives text, expected a tensor [T, 8]"]),
        (
            lambda: graph({"text": (ENCODER, {}), "image": (PAINTER, {"negative": "text.states"})}),
            ["stages.image.inputs.prompt: missing", "[T, 8]"],
        ),
        (
            lambda: graph({"text": (ENCODER, {}), "r": (READER, {"words": "text.states"})}, ["r.text"]),
            ["text.states gives a tensor [T, 8], expected text"],
        ),
        (
            lambda: graph({"text": (ENCODER, {"x": "text.text"}), "image": (PAINTER, {"prompt": "text.states"})}),
            ["stages.text.inputs.x", "no such input (it has none)"],
        ),
        (
            lambda: graph({"text": (ENCODER, {}), "idle": (ENCODER, {"x": "text.text"})}, ["text"]),
            ["stages.idle.inputs.x", "no such input"],
        ),
        (lambda: guided([]), ["outputs: got nothing"]),
        (lambda: guided(["imgae"]), ["outputs[0]: got 'imgae'", "did you mean 'image'"]),
        (lambda: guided(["image", "image.latent"]), ["outputs[1]", "no output 'latent'", "mean 'latents'"]),
        (lambda: guided(["image", "image"]), ["outputs[1]: got 'image' a second time"]),
        (lambda: guided(["image", "text.text"]), ["outputs[1]: got 'text.text', which is text", "'text'"]),
        (
            lambda: graph({"text": (ENCODER, {}), "r": (READER, {"words": "text.text"})}, ["r"]),
            ["outputs[0]: got 'r', a stage without a result of its own", "r.text"],
        ),
        (lambda: graph({"model": (ENCODER, {})}, ["model"]), ["stages.model", "top-level key"]),
        (lambda: graph({"a-b": (ENCODER, {})}, ["a-b"]), ["'a-b'", "letters, digits and underscores"]),
    ],
)
def test_a_wrong_graph_is_an_error_that_names_the_key(build: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        build()
    for word in words:
        assert word in str(caught.value)


def test_widths_must_agree_and_named_dimensions_take_any() -> None:
    def painter(*dims: int | str) -> StageSignature:
        return StageSignature(
            inputs={"prompt": TensorSpec(dims)}, outputs={"image": STATES}, results=frozenset({"image"})
        )

    def connect(*dims: int | str) -> StageGraph:
        return graph({"text": (ENCODER, {}), "image": (painter(*dims), {"prompt": "text.states"})})

    assert connect("tokens", 8).edges and connect("T", "D").edges and connect(5, 8).edges
    for dims in [("T", 9), ("T",), ("L", "T", 8)]:
        with pytest.raises(ConfigError, match=r"text.states gives a tensor \[T, 8\], expected a tensor \["):
            connect(*dims)


def test_a_cycle_is_named_in_the_direction_of_its_edges() -> None:
    relay = StageSignature(inputs={"x": STATES, "y": STATES}, outputs={"out": STATES}, results=frozenset({"out"}))
    stages = {
        "start": (ENCODER, {}),
        "a": (relay, {"x": "start.states", "y": "c.out"}),
        "b": (relay, {"x": "a.out"}),
        "c": (relay, {"x": "b.out"}),
        "end": (relay, {"x": "c.out"}),
    }
    with pytest.raises(ConfigError, match="cycle: ") as caught:
        graph(stages, ["end"])
    names = str(caught.value).split("cycle: ")[1].split(" -> ")
    assert names[0] == names[-1] and set(names) == {"a", "b", "c"} and len(names) == 4
    assert all(f"{source}.out" in stages[target][1].values() for source, target in pairwise(names))


def test_the_graph_of_a_config_uses_the_signatures_of_its_engines() -> None:
    stages = {
        "source": {"kind": "echo", "width": 6},
        "loud": {"kind": "upper", "width": 6, "inputs": {"text": "source.text", "states": "source.states"}},
    }
    config = {"name": "toys", "stages": stages, "outputs": ["loud"]}
    drawn = Pipeline(load_config(config)).graph
    assert drawn.order == ("source", "loud") and drawn.wanted_ports("source") == {"text", "states"}
    with pytest.raises(
        ConfigError, match=r"config 'toys': stages.loud.inputs.states: source.states gives a tensor \[T, 7\]"
    ):
        Pipeline(load_config(config, ["source.width=7"]))


def test_what_an_engine_says_of_its_stage_gets_the_whole_key() -> None:
    config = {"name": "toys", "stages": {"source": {"kind": "echo"}}, "outputs": ["source"]}
    with pytest.raises(ConfigError, match=r"^config 'toys': stages\.source\.width: got 5000, expected at most 4096$"):
        Pipeline(load_config(config, ["source.width=5000"]))
    with pytest.raises(ConfigError, match=r"^config 'toys': stages\.source\.model: got 'real', expected a toy$"):
        Pipeline(load_config(config, ["source.model=real"]))


RELAY = StageSignature(inputs={f"in{i}": STATES for i in range(8)}, outputs={"out": STATES}, results=frozenset({"out"}))


@st.composite
def dags(draw: st.DrawFn) -> tuple[dict[str, dict[str, str]], list[str], list[int]]:
    """Stages s0.. that read earlier ones, in a shuffled order of declaration; every sink is an output."""
    size = draw(st.integers(1, 8))
    inputs = {}
    for index in range(size):
        sources = draw(st.sets(st.integers(0, index - 1))) if index else set()
        inputs[f"s{index}"] = {f"in{source}": f"s{source}.out" for source in sources}
    read = {origin.split(".")[0] for edges in inputs.values() for origin in edges.values()}
    outputs = [name for name in inputs if name not in read]
    return inputs, outputs, draw(st.permutations(range(size)))


def relays(inputs: Mapping[str, Mapping[str, str]], outputs: Sequence[str]) -> StageGraph:
    return graph({name: (RELAY, edges) for name, edges in inputs.items()}, outputs)


@given(dags())
def test_the_order_respects_every_edge_and_holds_every_stage_once(dag: Any) -> None:
    inputs, outputs, shuffle = dag
    drawn = relays({f"s{i}": inputs[f"s{i}"] for i in shuffle}, outputs)
    assert sorted(drawn.order) == sorted(inputs)
    assert all(drawn.order.index(edge.source) < drawn.order.index(edge.target) for edge in drawn.edges)
    assert len(drawn.edges) == sum(map(len, inputs.values()))


@given(dags(), st.data())
def test_one_edge_backwards_along_a_path_is_found_as_a_cycle(dag: Any, data: st.DataObject) -> None:
    inputs, outputs, _ = dag
    edges = [(name, origin.split(".")[0]) for name, origins in inputs.items() for origin in origins.values()]
    if not edges:
        return
    target, source = data.draw(st.sampled_from(edges))
    looped = {**inputs, source: {**inputs[source], f"in{target[1:]}": f"{target}.out"}}
    with pytest.raises(ConfigError, match="cycle") as caught:
        relays(looped, [*outputs, target] if target not in outputs else outputs)
    names = str(caught.value).split("cycle: ")[1].split(" -> ")
    assert names[0] == names[-1] and len(set(names)) == len(names) - 1 >= 2
    assert all(f"{a}.out" in looped[b].values() for a, b in pairwise(names))


@given(dags(), st.data())
def test_demand_is_the_closure_of_what_is_read_and_nothing_else(dag: Any, data: st.DataObject) -> None:
    inputs, outputs, _ = dag
    wants = {name: frozenset(p for p in RELAY.inputs if data.draw(st.booleans())) for name in inputs}
    asked: list[str] = []

    def needed(stage: str) -> frozenset[str]:
        asked.append(stage)
        return wants[stage]

    demand = relays(inputs, outputs).demand(needed)
    expected, frontier = set(outputs), list(outputs)
    while frontier:
        stage = frontier.pop()
        for port, origin in inputs[stage].items():
            source = origin.split(".")[0]
            if port in wants[stage] and source not in expected:
                expected.add(source)
                frontier.append(source)
    assert set(demand) == expected == set(asked) and len(asked) == len(expected)
    assert all(demand[stage] == wants[stage] & set(inputs[stage]) for stage in demand)
    assert list(demand) == [stage for stage in relays(inputs, outputs).order if stage in demand]


@given(dags(), st.data())
def test_what_no_output_calls_for_is_idle_and_reads_nothing(dag: Any, data: st.DataObject) -> None:
    inputs, _, _ = dag
    listed = data.draw(st.lists(st.sampled_from(sorted(inputs)), min_size=1, unique=True))
    called_for, frontier = set(listed), list(listed)
    while frontier:
        sources = {origin.split(".")[0] for origin in inputs[frontier.pop()].values()}
        frontier += sources - called_for
        called_for |= sources
    drawn = relays(inputs, listed)
    assert set(drawn.order) == called_for == set(drawn.signatures) and set(drawn.idle) == set(inputs) - called_for
    assert len(drawn.order) + len(drawn.idle) == len(inputs)
    assert all({edge.source, edge.target} <= called_for for edge in drawn.edges)
    assert len(drawn.edges) == sum(len(inputs[stage]) for stage in called_for)
    for stage in drawn.order:
        assert {edge.target for edge in drawn.edges_from(stage)} <= called_for
        assert bool(drawn.wanted_ports(stage)) == (stage in listed or bool(drawn.edges_from(stage)))
