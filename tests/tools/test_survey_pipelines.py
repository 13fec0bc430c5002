"""The survey of diffusers' pipelines: a few of each kind are equal to plain diffusers, and the page tells of all."""

from __future__ import annotations

import re

import pytest

from tools.survey_pipelines import FOLDERS, MAKERS, PAGE, exported, outcome

FEW = [
    "StableDiffusionInpaintPipeline",
    "StableDiffusionXLControlNetPipeline",
    "FluxFillPipeline",
    "StableDiffusion3Pipeline",
    "IFPipeline",
    "StableAudioPipeline",
    "LTXImageToVideoPipeline",
]


@pytest.mark.parametrize("name", FEW)
def test_a_pipeline_gives_bit_for_bit_what_plain_diffusers_gives(name: str) -> None:
    assert outcome(name) == "equal"


def test_classes_that_are_refused_and_not_tried_are_told_apart() -> None:
    assert "which no stage can hand on" in outcome("KandinskyPriorPipeline")
    assert outcome("HiDreamImagePipeline").startswith("not tried")


def test_the_page_has_a_row_for_every_pipeline_and_calls_those_that_are_tried_equal() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert set(exported()) <= set(rows)
    tried = {name: rows[name] for name in (*MAKERS, *FOLDERS) if not rows[name].startswith("not tried")}
    assert len(tried) > 50 and all(rows[name] == "equal" for name in FEW)
    assert not [name for name, text in tried.items() if text.startswith("differs")]
