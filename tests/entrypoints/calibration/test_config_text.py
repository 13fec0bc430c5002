"""The key `cache` in the text of a config: it is set, and nothing else changes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_omni.config.parsing import parse_mapping
from vllm_omni.config.shipped import shipped_configs
from vllm_omni.entrypoints.calibration.config_text import cache_line, with_cache
from vllm_omni.errors import ConfigError

CACHE = {"policy": "teacache", "threshold": 0.3, "coefficients": [1.0, -2.5, 1e-7], "fitted_on": "0123456789abcdef"}
BLOCK = """\
# made by hand
name: mine
stages:
  image:   # draws
    kind: dit
    model: ${oc.env:M,x}  # where it lies

  other: {kind: ar, model: y}

outputs: [image]
"""
OLD = BLOCK.replace(
    "    kind: dit\n", "    cache:\n      policy: first_block\n      threshold: 0.2  # gone\n    kind: dit\n"
)
INLINE = "stages: {image: {kind: dit, cache: {policy: none}, model: x}, other: {kind: ar}} # all\noutputs: [image]"
BARE = "outputs: [image]\nstages:\n  image:\n    kind: dit\n    defaults:\n      height: 64 # pixels"


@pytest.mark.parametrize("text", [BLOCK, OLD, INLINE, BARE, BLOCK.replace("{kind: ar, model: y}", "\n    kind: ar")])
@pytest.mark.parametrize("stage", ["image", "other"])
def test_one_key_of_one_stage_changes(text: str, stage: str) -> None:
    if stage not in parse_mapping(text)["stages"]:
        return
    expected = parse_mapping(text)
    expected["stages"][stage]["cache"] = CACHE
    changed = with_cache(text, stage, CACHE)
    assert parse_mapping(changed) == expected
    kept = [line for line in text.splitlines() if stage not in line and "cache" not in line and "{" not in line]
    replaced = ("policy: first_block", "threshold: 0.2")
    assert all(line in changed.splitlines() for line in kept if not line.strip().startswith(replaced))
    assert with_cache(changed, stage, CACHE) == changed, "again, and nothing moves"


@pytest.mark.parametrize("name", ["tiny_image", "ace_step", "tiny_omni"])
@settings(max_examples=15, deadline=None)
@given(numbers=st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=40))
def test_shipped_configs_keep_every_line(name: str, numbers: list[float]) -> None:
    text = shipped_configs()[name].read_text(encoding="utf-8")
    stage = next(key for key, stage in parse_mapping(text)["stages"].items() if stage["kind"] == "dit")
    changed = with_cache(text, stage, {"policy": "magcache", "ratios": numbers, "fitted_on": "x"})
    assert set(text.splitlines()) <= set(changed.splitlines())
    assert parse_mapping(changed)["stages"][stage]["cache"]["ratios"] == numbers


def test_a_stage_that_another_one_is_an_alias_of_is_refused_with_the_line_to_write() -> None:
    shared = "stages:\n  image: &a\n    kind: dit\n  other: *a\noutputs: [image]\n"
    with pytest.raises(ConfigError, match=r"put this line there by hand: cache: {policy: teacache"):
        with_cache(shared, "image", CACHE)


def test_the_line_is_what_a_config_reads() -> None:
    assert parse_mapping(cache_line(CACHE))["cache"] == CACHE
