"""Conditions on edges, in the graph and in the scheduler: who runs, who is skipped and why, what is held and let go."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from support.scheduler import request, stages_of
from support.toy_stage import register_toys

from vllm_omni.config.condition import Condition
from vllm_omni.config.graph import Edge, StageGraph
from vllm_omni.config.loader import load_config
from vllm_omni.config.schema import EdgeConfig, OmniConfig, StageConfig
from vllm_omni.core.routing.omni_scheduler import OmniScheduler
from vllm_omni.core.routing.request_plan import RequestPlan, StagePlan, default_plan
from vllm_omni.core.routing.request_state import RequestEnd
from vllm_omni.errors import ConfigError, StageError
from vllm_omni.messages import StageTask
from vllm_omni.params import StageParams
from vllm_omni.payload import StagePayload, StageSignature, TensorSpec, TextSpec
from vllm_omni.request import RequestStatus

register_toys()

WORDS = TextSpec()
THINKER = StageSignature(
    outputs={"text": WORDS, "sound": WORDS, "states": TensorSpec(("T", 4))},
    results=frozenset({"text"}),
    meta=frozenset({"text", "n"}),
)
READER = StageSignature(
    inputs={"words": WORDS, "hint": WORDS, "states": TensorSpec(("T", 4))},
    outputs={"text": WORDS},
    required_inputs=frozenset({"words"}),
    results=frozenset({"text"}),
)
LOOSE = dataclasses.replace(READER, required_inputs=frozenset())
Inputs = Mapping[str, "str | EdgeConfig"]


def when(source: str, condition: str) -> EdgeConfig:
    return EdgeConfig(source, condition)


def graph(outputs: tuple[str, ...] = ("a", "end"), **stages: tuple[StageSignature, Inputs]) -> StageGraph:
    """A thinker `a` and the given stages."""
    everything = {"a": (THINKER, {}), **stages}
    configs = {name: StageConfig(name=name, kind="toy", inputs=inputs) for name, (_, inputs) in everything.items()}
    return StageGraph(configs, {name: signature for name, (signature, _) in everything.items()}, outputs)


class Run:
    """One request through a graph, every launched stage done by hand."""

    def __init__(self, drawn: StageGraph, plan: RequestPlan | None = None) -> None:
        self.machine = OmniScheduler(OmniConfig(), drawn)
        self.machine.schedule(request(timeout_s=300.0), plan)
        self.inputs: dict[str, Mapping[str, Any]] = {}

    def tick(self, now: float = 0.0) -> list[str]:
        """Stages that launch now."""
        launches: list[StageTask] = self.machine.tick(now)
        self.machine.check_integrity()
        self.inputs.update({launch.stage: launch.inputs for launch in launches})
        return stages_of(launches)

    def done(self, stage: str, tensors: Mapping[str, torch.Tensor] | None = None, **meta: Any) -> None:
        given = {"states": torch.ones(2, 4)} if tensors is None else tensors
        self.machine.stage_done("r", stage, StagePayload("r", stage, given, {"text": stage, **meta}), {}, 0.0)
        self.machine.check_integrity()

    def end(self) -> RequestEnd:
        (end,) = self.machine.take_ends()
        assert not self.machine.has_work and self.machine.in_flight() == set()
        return end


# In the config and in the graph


def config(edge: Any) -> dict[str, Any]:
    return {
        "stages": {"source": {"kind": "echo"}, "loud": {"kind": "upper", "inputs": {"text": edge}}},
        "outputs": ["source", "loud"],
    }


def test_an_edge_is_a_name_or_a_mapping_with_a_condition() -> None:
    short, long = (load_config(config(edge)).stages["loud"] for edge in ("source.text", {"from": "source.text"}))
    assert short.edges == long.edges == {"text": EdgeConfig("source.text")}
    edge = load_config(config({"from": "source.text", "when": "text != ''"})).stages["loud"].edges["text"]
    assert edge == EdgeConfig("source.text", "text != ''") and edge.stage == "source"


@pytest.mark.parametrize("edge", ["source.text", {"from": "source.text"}, {"from": "source.text", "when": "n"}])
def test_an_override_sets_the_condition_of_either_form(edge: Any) -> None:
    for words in ("sound == 'C4' and n > 2", "not n", "text in ['a', 'b']"):
        changed = load_config(config(edge), [f"loud.inputs.text.when={words}"]).stages["loud"]
        assert changed.edges["text"] == EdgeConfig("source.text", words)
    assert load_config(config(edge), ["loud.inputs.text.when=null"]).stages["loud"].edges["text"].when is None
    moved = load_config(config(edge), ["loud.inputs.text.from=other.text"]).stages["loud"].edges["text"]
    assert moved.source == "other.text"


@pytest.mark.parametrize(
    ("edge", "words"),
    [
        ({"when": "n"}, "stages.loud.inputs.text.from: missing; it is required"),
        ({"from": "source.text", "wehn": "n"}, "stages.loud.inputs.text.wehn: unknown key (did you mean 'when'?)"),
        ({"from": "source.text", "strem": {}}, "stages.loud.inputs.text.strem: unknown key (did you mean 'stream'?)"),
        ({"source": "source.text"}, "stages.loud.inputs.text.source: unknown key"),
        ({"from": 3}, "stages.loud.inputs.text.from: got 3, expected a string"),
        ({"from": "source.text", "when": True}, "stages.loud.inputs.text.when: got True, expected a string"),
        ({"from": "source.text", "when": "len(n)"}, "stages.loud.inputs.text.when: got 'len(n)', expected names"),
        ({"from": "source.text", "when": "n >"}, "stages.loud.inputs.text.when: got 'n >', which cannot be read"),
        (["source.text"], "stages.loud.inputs.text: got ['source.text'], expected a string or a mapping"),
    ],
)
def test_a_wrong_edge_is_an_error_that_names_its_key(edge: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(config(edge))
    assert words in str(caught.value)


def test_an_edge_of_the_graph_carries_its_condition() -> None:
    drawn = graph(end=(READER, {"words": when("a.sound", "sound"), "states": "a.states"}))
    condition = Condition.parse("sound")
    assert drawn.edges_into("end") == (
        Edge("a", "sound", "end", "words", condition),
        Edge("a", "states", "end", "states"),
    )
    assert [edge.is_text for edge in drawn.edges] == [True, False]
    assert str(drawn.edges[0]) == "a.sound -> end.words" and drawn.wanted_ports("a") == {"text", "sound", "states"}


def test_a_name_that_the_source_never_gives_is_found_at_load() -> None:
    with pytest.raises(ConfigError, match=r"stages\.end\.inputs\.words\.when: got 'soud', .* mean 'sound'"):
        graph(end=(READER, {"words": when("a.text", "n > 1 and soud")}))
    free = (dataclasses.replace(THINKER, meta=None, inputs={"words": WORDS}), {"words": "a.text"})
    assert graph(b=free, end=(READER, {"words": when("b.text", "anything")}))
    with pytest.raises(ConfigError, match=r"stages\.end\.inputs\.words: got 'a\.soud'"):
        graph(end=(READER, {"words": when("a.soud", "sound")}))


# Who runs


def test_a_condition_that_holds_changes_nothing() -> None:
    run = Run(graph(end=(READER, {"words": when("a.sound", "sound and n > 1")})))
    assert run.tick() == ["a"]
    run.done("a", sound="C4", n=2)
    assert run.tick() == ["end"] and run.inputs["end"] == {"words": "C4"}
    run.done("end")
    end = run.end()
    assert end.status is RequestStatus.FINISHED and set(end.payloads) == {"a", "end"}
    assert "skipped" not in end.metrics["end"]


def test_a_stage_without_its_required_input_is_skipped_and_says_why() -> None:
    run = Run(graph(end=(READER, {"words": when("a.sound", "sound")})))
    run.tick()
    run.done("a")
    end = run.end()
    assert end.status is RequestStatus.FINISHED and end.error is None and set(end.payloads) == {"a"}
    assert end.metrics["end"] == {"skipped": True, "reason": "a.sound -> end.words: when 'sound' is false"}
    assert "ran_s" in end.metrics["a"]


def test_an_optional_input_that_is_lost_is_left_out() -> None:
    run = Run(graph(end=(READER, {"words": "a.text", "hint": when("a.sound", "sound")})))
    run.tick()
    run.done("a")
    assert run.tick() == ["end"] and run.inputs["end"] == {"words": "a"}


def test_a_stage_that_loses_all_its_optional_inputs_still_runs() -> None:
    run = Run(graph(end=(LOOSE, {"hint": when("a.sound", "sound"), "words": when("a.text", "n")})))
    run.tick()
    run.done("a")
    assert run.tick() == ["end"] and run.inputs["end"] == {}


def test_skipping_goes_down_to_every_stage_that_cannot_run_without_it() -> None:
    drawn = graph(
        ("a", "end", "loose"),
        b=(READER, {"words": when("a.sound", "sound")}),
        end=(READER, {"words": "b.text", "hint": "a.text"}),
        loose=(LOOSE, {"words": "b.text", "hint": "a.text"}),
    )
    run = Run(drawn)
    run.tick()
    run.done("a")
    assert run.tick() == ["loose"] and run.inputs["loose"] == {"hint": "a"}
    run.done("loose")
    end = run.end()
    reason = "a.sound -> b.words: when 'sound' is false"
    assert {stage: metrics.get("reason") for stage, metrics in end.metrics.items()} == {
        "a": None,
        "b": reason,
        "end": reason,
        "loose": None,
    }
    assert set(end.payloads) == {"a", "loose"}


def upstream(*outputs: str) -> StageGraph:
    """a decides over end, which also reads helper; helper reads slow, which reads nothing."""
    return graph(
        ("a", "end", *outputs),
        slow=(THINKER, {}),
        helper=(READER, {"words": "slow.text"}),
        end=(READER, {"words": when("a.sound", "sound"), "hint": "helper.text"}),
    )


def test_a_stage_that_would_work_for_skipped_ones_alone_is_skipped_unless_it_has_started() -> None:
    run = Run(upstream())
    assert run.tick() == ["a", "slow"]
    run.done("a")
    assert run.tick() == [] and run.machine.in_flight() == {("r", "slow")}
    run.done("slow")
    end = run.end()
    assert end.status is RequestStatus.FINISHED and end.metrics["helper"]["skipped"] and end.metrics["end"]["skipped"]
    assert "ran_s" in end.metrics["slow"]


def test_a_stage_that_outputs_lists_or_another_reads_goes_on() -> None:
    listed = Run(upstream("helper"))
    listed.tick()
    listed.done("a")
    listed.done("slow")
    assert listed.tick() == ["helper"]
    shared = Run(
        graph(
            ("a", "end", "other"),
            helper=(READER, {"words": "a.text"}),
            end=(READER, {"words": when("a.sound", "sound"), "hint": "helper.text"}),
            other=(READER, {"words": "helper.text"}),
        )
    )
    shared.tick()
    shared.done("a")
    assert shared.tick() == ["helper"]


def test_branches_that_are_taken_launch_in_one_tick() -> None:
    drawn = graph(
        ("a", "b", "c", "d"),
        b=(READER, {"words": when("a.text", "n > 1")}),
        c=(READER, {"words": when("a.sound", "sound")}),
        d=(READER, {"words": when("a.text", "not sound")}),
    )
    run = Run(drawn)
    run.tick()
    run.done("a", n=2, sound="C4")
    assert run.tick() == ["b", "c"]


def test_one_output_under_two_conditions_is_held_as_long_as_one_reader_may_come() -> None:
    drawn = graph(
        ("a", "b", "end"),
        b=(LOOSE, {"words": when("a.sound", "n"), "hint": when("a.sound", "not n")}),
        end=(READER, {"words": "b.text", "hint": "a.sound"}),
    )
    run = Run(drawn)
    run.tick()
    run.done("a", sound="C4")
    assert run.tick() == ["b"] and run.inputs["b"] == {"hint": "C4"}
    run.done("b")
    assert run.tick() == ["end"] and run.inputs["end"] == {"words": "b", "hint": "C4"}


def test_the_plan_of_a_stage_says_what_it_requires_of_what_it_reads() -> None:
    plan = default_plan(graph(end=(READER, {"words": when("a.sound", "sound"), "hint": "a.text"})))
    assert plan.stages["end"].required_inputs == {"words"} and len(plan.stages["end"].edges) == 2


# Ends


def test_a_condition_that_cannot_be_decided_fails_its_request_alone() -> None:
    run = Run(graph(end=(READER, {"words": when("a.text", "n > 3")})))
    run.machine.schedule(request("good"))
    run.tick()
    run.done("a")
    (end,) = run.machine.take_ends()
    assert end.status is RequestStatus.FAILED and isinstance(end.error, StageError)
    assert "a.text -> end.words: when 'n > 3' cannot be decided" in str(end.error)
    run.machine.stage_done("good", "a", StagePayload("good", "a", {}, {"text": "a", "n": 4}), {}, 0.0)
    assert stages_of(run.machine.tick(0.0)) == ["end"]
    run.machine.check_integrity()


@pytest.mark.parametrize(
    "inputs",
    [{"words": when("a.text", "n > 3")}, {"words": "a.sound"}, {"words": "a.text", "states": "a.states"}],
    ids=["undecided", "not written", "empty"],
)
def test_what_a_stage_gave_is_the_callers_though_no_reader_can_go_on_with_it(inputs: Inputs) -> None:
    run = Run(graph(outputs=("a", "a.states", "end"), end=(READER, inputs)))
    run.tick()
    run.done("a", tensors={"states": torch.zeros(0, 4)})
    end = run.end()
    assert end.status is RequestStatus.FAILED and isinstance(end.error, StageError)
    assert end.payloads["a"].meta["text"] == "a" and end.payloads["a"].tensors["states"].shape == (0, 4)


def test_words_that_were_not_written_fail_with_the_writer_the_section_and_the_fix() -> None:
    run = Run(graph(end=(READER, {"words": "a.sound"})))
    run.tick()
    run.done("a", text="C4")
    error = str(run.end().error)
    assert "stage 'a' gave no 'sound' (it gave ['states', 'text']), which stage 'end' reads as 'words'" in error
    assert "`when: sound`" in error


def test_what_a_skipped_stage_would_have_read_need_not_be_there() -> None:
    for inputs in ({"hint": "a.sound"}, {"states": "a.states"}):
        run = Run(graph(end=(READER, {**inputs, "words": when("a.text", "n")})))
        run.tick()
        run.done("a", tensors={})
        end = run.end()
        assert end.error is None and end.metrics["end"]["skipped"] is True


def test_a_tensor_that_was_not_given_is_no_matter_of_conditions() -> None:
    run = Run(graph(end=(READER, {"words": "a.text", "states": "a.states"})))
    run.tick()
    run.done("a", tensors={})
    error = str(run.end().error)
    assert "gave no 'states'" in error and "when" not in error


def test_an_empty_tensor_fails_with_the_writer_and_the_fix_and_only_where_it_is_read() -> None:
    for condition, status in ((None, RequestStatus.FAILED), ("n", RequestStatus.RUNNING)):
        run = Run(graph(end=(READER, {"words": "a.text", "states": EdgeConfig("a.states", condition)})))
        run.tick()
        run.done("a", tensors={"states": torch.zeros(0, 4)})
        if status is RequestStatus.RUNNING:
            assert run.tick() == ["end"] and run.inputs["end"] == {"words": "a"}
            continue
        error = str(run.end().error)
        assert "stage 'a' gave an empty 'states' [0, 4], which stage 'end' reads as 'states'" in error
        assert "min_tokens" in error and "`when: text`" in error


def test_a_payload_from_the_prompt_cache_decides_as_the_stage_itself_would() -> None:
    drawn = graph(
        ("a", "end", "other"),
        end=(READER, {"words": when("a.sound", "sound")}),
        other=(READER, {"words": when("a.text", "n")}),
    )
    plan = default_plan(drawn)
    cached = dataclasses.replace(plan.stages["a"], cache_key=lambda inputs: "k")
    plan = dataclasses.replace(plan, stages={**plan.stages, "a": cached})
    run = Run(drawn, plan)
    assert run.tick() == ["a"]
    run.done("a", n=1)
    assert run.tick() == ["other"]
    run.done("other")
    first = run.end()
    run.machine.schedule(request(), plan)
    assert run.tick() == ["other"], "a and its conditions were answered from the cache"
    run.done("other")
    second = run.end()
    assert second.metrics["a"]["cached"] is True and "cached" not in first.metrics["a"]
    assert second.metrics["end"] == first.metrics["end"] and second.metrics["end"]["skipped"] is True


def test_a_failing_branch_abandons_the_other_and_names_the_cause() -> None:
    run = Run(
        graph(
            ("a", "b", "c", "d"),
            b=(READER, {"words": "a.text"}),
            c=(READER, {"words": when("a.sound", "sound")}),
            d=(READER, {"words": when("a.sound", "n")}),
        )
    )
    run.tick()
    run.done("a", sound="C4")
    assert run.tick() == ["b", "c"]
    cause = StageError("no memory")
    run.machine.stage_failed("r", "c", cause)
    end = run.end()
    assert (end.status, end.error, end.abandoned) == (RequestStatus.FAILED, cause, ("b",))
    assert end.metrics["d"]["skipped"] is True
    run.done("b")
    assert run.machine.get_metrics()["stray_events"] == 1


@pytest.mark.parametrize("ending", ["abort", "deadline"])
def test_an_early_end_of_a_request_with_skipped_stages_leaves_nothing(ending: str) -> None:
    run = Run(upstream())
    run.tick()
    run.done("a")
    if ending == "abort":
        run.machine.abort("r")
    else:
        run.tick(now=1e6)
    end = run.end()
    assert end.abandoned == ("slow",) and set(end.metrics) == {"a", "end", "helper"}


def test_integrity_notices_a_stage_that_waits_in_vain() -> None:
    run = Run(graph(end=(READER, {"words": "a.text", "hint": "a.sound"})))
    run.tick()
    state = run.machine._requests.running["r"]
    state._awaited["end"] = [edge for edge in state._awaited["end"] if edge.target_port != "words"]
    state.missing["end"] = 1
    with pytest.raises(Exception, match="will never have \\['words'\\]"):
        run.machine.check_integrity()


def test_a_plan_by_hand_may_say_what_is_required() -> None:
    edge = Edge("a", "text", "end", "words", Condition.parse("n"))
    stages = {"a": StagePlan(StageParams()), "end": StagePlan(StageParams(), [edge])}
    run = Run(graph(end=(READER, {"words": "a.text"})), RequestPlan(stages))
    run.tick()
    run.done("a")
    assert run.tick() == ["end"]
