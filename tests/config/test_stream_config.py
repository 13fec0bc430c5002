"""Streamed edges in configs and graphs: the numbers, what is refused, which ports are wanted, how a graph is drawn."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from support.toy_stream import register_streams

from vllm_omni.config.graph import Edge, StageGraph
from vllm_omni.config.loader import load_config
from vllm_omni.config.schema import EdgeConfig, OmniConfig, StreamConfig
from vllm_omni.entrypoints.cli.graph_report import describe, draw_graph
from vllm_omni.errors import ConfigError
from vllm_omni.executor.pipeline import Pipeline

register_streams()

STREAM = StreamConfig(first_chunk=4, chunk=25, left_context=25, look_ahead=12)


def config(edge: Any = "talker.codes", port: str = "codes", **more: Any) -> dict[str, Any]:
    stages = {"talker": {"kind": "toy_writer"}, "voice": {"kind": "toy_voice", "inputs": {port: edge}}, **more}
    return {"stages": stages, "outputs": [list(stages)[-1]]}


def load(edge: Any, *overrides: str, **more: Any) -> OmniConfig:
    return load_config(config(edge, **more), overrides)


def graph(edge: Any, **more: Any) -> StageGraph:
    return Pipeline(load(edge, **more)).graph


def streamed(**keys: Any) -> dict[str, Any]:
    return {"from": "talker.codes", "stream": keys}


def test_a_stream_is_read_with_its_defaults() -> None:
    (edge,) = load(streamed()).stages["voice"].edges.values()
    assert edge == EdgeConfig("talker.codes", stream=StreamConfig())
    keys = dataclasses.asdict(STREAM)
    (edge,) = load(streamed(**keys)).stages["voice"].edges.values()
    assert edge.stream == STREAM


@pytest.mark.parametrize("edge", ["talker.codes", {"from": "talker.codes"}, streamed(chunk=3)])
def test_an_override_makes_changes_and_removes_a_stream(edge: Any) -> None:
    inputs = load(edge, "voice.inputs.codes.stream.chunk=7", "voice.inputs.codes.stream.look_ahead=2").stages["voice"]
    assert inputs.edges["codes"].stream == StreamConfig(chunk=7, look_ahead=2)
    assert load(edge, "voice.inputs.codes.stream={}").stages["voice"].edges["codes"].stream == StreamConfig()
    assert load(edge, "voice.inputs.codes.stream=null").stages["voice"].edges["codes"].stream is None


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"first_chunk": 0}, "stream.first_chunk: got 0, expected at least 1"),
        ({"chunk": 0}, "stream.chunk: got 0, expected at least 1"),
        ({"chunk": 2.5}, "stream.chunk: got 2.5, expected an integer"),
        ({"left_context": -1}, "stream.left_context: got -1, expected at least 0"),
        ({"look_ahead": -1}, "stream.look_ahead: got -1, expected at least 0"),
        ({"chunk_timeout_s": 0}, "stream.chunk_timeout_s: got 0.0, expected more than 0"),
        ({"max_ahead": 0}, "stream.max_ahead: got 0, expected at least 1"),
        ({"max_ahead": 15, "first_chunk": 4, "look_ahead": 12}, "stream.max_ahead: got 15, expected at least 16"),
        ({"max_ahead": 36, "chunk": 25, "look_ahead": 12}, "stream.max_ahead: got 36, expected at least 37"),
        ({"chunk": 5, "max_chunk": 4}, "stream.max_chunk: got 4, expected at least 5"),
        (
            {"max_ahead": 60, "chunk": 25, "max_chunk": 50, "look_ahead": 12},
            "stream.max_ahead: got 60, expected at least 62",
        ),
        ({"chunks": 3}, "stream.chunks: unknown key (did you mean 'chunk'?)"),
    ],
)
def test_a_number_out_of_range_is_refused_with_its_key(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(streamed(**keys))
    assert f"stages.voice.inputs.codes.{words}" in str(error.value)


def test_the_least_max_ahead_is_accepted() -> None:
    (edge,) = load(streamed(max_ahead=37, chunk=25, look_ahead=12)).stages["voice"].edges.values()
    assert edge.stream is not None and edge.stream.max_ahead == 37


def test_a_stream_cannot_have_a_condition() -> None:
    with pytest.raises(ConfigError, match=r"inputs\.codes\.stream: cannot stand beside 'when' \('text'\).*remove one"):
        load({**streamed(), "when": "text"})


def test_a_source_that_gives_the_port_only_whole_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        graph({"from": "talker.summary", "stream": {}})
    assert "voice.inputs.codes.stream: 'talker' gives 'summary' only whole; remove `stream`" in str(error.value)
    assert "or read a port that streams: codes" in str(error.value)


def test_a_reader_that_takes_the_port_only_whole_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        Pipeline(load_config(config(streamed(), port="summary")))
    assert "voice.inputs.summary.stream: 'voice' reads 'summary' only whole; remove `stream`" in str(error.value)
    assert "or feed a port that streams: codes" in str(error.value)


def test_a_streamed_port_is_wanted_whole_only_where_somebody_reads_it_whole() -> None:
    drawn = graph(streamed(chunk=3))
    (edge,) = drawn.edges_from("talker")
    assert edge == Edge("talker", "codes", "voice", "codes", stream=StreamConfig(chunk=3)) and edge.takes_chunks
    assert drawn.wanted_ports("talker") == frozenset() and drawn.streamed_ports("talker") == {"codes"}
    both = graph(streamed(), whole={"kind": "toy_voice", "inputs": {"summary": "talker.codes", "codes": "voice.sound"}})
    assert both.wanted_ports("talker") == both.streamed_ports("talker") == {"codes"}
    whole = graph("talker.codes")
    assert whole.wanted_ports("talker") == {"codes"} and whole.streamed_ports("talker") == frozenset()
    assert whole.edges_into("voice")[0].takes_chunks


def test_the_drawing_and_the_ports_say_how_an_edge_streams() -> None:
    loaded = load(streamed(first_chunk=4, chunk=25, left_context=25, look_ahead=12))
    pipeline = Pipeline(loaded)
    drawn = pipeline.graph
    assert draw_graph(loaded, drawn) == [
        "  ●  talker · toy_writer",
        "  │  talker.codes ⇶ codes  4, 25 … rows, 25 before, 12 after",
        "  ●  voice · toy_voice  => voice",
    ]
    lines = [" ".join(line.split()) for line in describe(pipeline, {}).split("\n")]
    assert "voice in codes [T, 2] <- talker.codes ⇶ 4, 25 … rows, 25 before, 12 after" in lines
    assert "talker out codes [T, 2] -> voice.codes ⇶ 4, 25 … rows, 25 before, 12 after" in lines
    assert draw_graph(load(streamed()), graph(streamed()))[1] == "  │  talker.codes ⇶ codes  1 … rows"
