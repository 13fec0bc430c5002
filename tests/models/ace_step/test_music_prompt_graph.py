"""The stage kind `music_prompt` in a graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.toy_engine import register_toys

from vllm_omni import DiffusionParams, Omni


def graph(folder: Path, **section: Any) -> dict[str, Any]:
    register_toys()
    prompt = {"kind": "music_prompt", "model": str(folder), **section}
    reader = {"kind": "toy_text", "inputs": {"words": "prompt.caption"}, "defaults": {"steps": 1}}
    return {"stages": {"prompt": prompt, "reader": reader}, "outputs": ["reader"]}


def test_the_words_may_be_another_stages(folder: Path) -> None:
    config = graph(folder, inputs={"prompt": "writer.text"}, default_duration_s=2.0)
    config["stages"]["writer"] = {"kind": "toy_text", "defaults": {"steps": 2}}
    with Omni(config) as omni:
        (output,) = omni.generate("la ")
    assert "# Caption\nla la \n" in str(output.text)


def test_a_branch_that_is_not_taken_makes_no_music(folder: Path) -> None:
    config = graph(folder, inputs={"prompt": {"from": "writer.text", "when": "text == 'yes'"}})
    config["stages"]["writer"] = {"kind": "toy_text", "defaults": {"steps": 1}}
    with Omni(config) as omni:
        yes, no = omni.generate(["yes", "no"])
    assert "# Caption\nyes\n" in str(yes.text)
    assert no.error is None and no.text == "no" and no.metrics["prompt"]["skipped"]  # the reader has words of its own


def test_parameters_for_the_stage_by_name_are_those_that_it_reads(folder: Path) -> None:
    with Omni(graph(folder)) as omni:
        good, bad = omni.generate(
            ["a", "a"], [{"prompt": DiffusionParams(duration_s=3)}, {"prompt": DiffusionParams(seed=3)}]
        )
    assert "- duration: 3 seconds" in str(good.text)
    assert "params['prompt'].seed: this stage reads duration_s alone" in str(bad.error)


def test_a_graph_takes_the_request_keys_of_its_model_alone(folder: Path) -> None:
    with Omni(graph(folder, fields=["lyrics", "duration_s"], default_duration_s=2.0)) as omni:
        good, unknown, typo, planned = omni.generate(
            [{"prompt": "a", "duration_s": 3}, {"prompt": "a", "bpm": 90}, {"prompt": "a", "durations": 3}, "a"]
        )
        assert good.error is None and "- duration: 3 seconds" in str(good.text)
        assert "- duration: 2 seconds" in str(planned.text)
        assert "prompt['bpm']: unknown key (known:" in str(unknown.error)
        assert "prompt['durations']: unknown key (did you mean 'duration_s'?)" in str(typo.error)
