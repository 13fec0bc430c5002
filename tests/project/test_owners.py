"""One owner per thing, read from the syntax trees: where the objects that carry a decision are made, and where state
that says it is written.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

import vllm_omni

PACKAGE = Path(vllm_omni.__file__).parent
# what is decided -> (the classes that carry the decision, the attributes that say it, the one file that may do so)
OWNERS: dict[str, tuple[set[str], set[str], str]] = {
    "which task runs": ({"StageTask"}, set(), "core/routing/omni_scheduler.py"),
    "who is paused": ({"Pause", "Resume"}, set(), "core/routing/omni_scheduler.py"),
    "which writers are too far ahead": (set(), {"paused"}, "core/routing/request_streams.py"),
    "which rows make up a chunk, and in which order": ({"RowRange"}, set(), "core/routing/edge_stream.py"),
    "the rows of a chunk": ({"RowBuffer"}, set(), "executor/row_buffers.py"),
    "the end of a generation": (set(), {"finish_reason", "is_writing"}, "engine/ar/base.py"),
    "what a request asks of ACE-Step": (
        {"MusicRequest", "MusicOutline"},
        set(),
        "models/ace_step/prompt/request_reader.py",
    ),
    "the geometry of the KV pool": ({"KVPoolPlan"}, set(), "worker/ar/kv_pool.py"),
    "the KV pool": ({"KVPool"}, set(), "worker/ar/model_runner.py"),
    "the dtype of a stage": ({"choose_precision"}, set(), "engine/base.py"),
    "model folders": ({"snapshot_download"}, set(), "utils/hub.py"),
}


def found_in(source: str, classes: set[str], attributes: set[str]) -> list[str]:
    """The calls of these names, and the writes to attributes of these names."""
    calls, writes = calls_and_writes(source)
    return [name for name in calls if name in classes] + [name for name in writes if name in attributes]


@functools.cache
def calls_and_writes(source: str) -> tuple[list[str], list[str]]:
    """The names of all that is called, and of all attributes that are written to."""
    calls: list[str] = []
    writes: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            calls.append(node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", ""))
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        writes += [part.attr for part in targets if isinstance(part, ast.Attribute)]
    return calls, writes


@pytest.mark.parametrize("thing", OWNERS)
def test_one_file_decides(thing: str) -> None:
    classes, attributes, owner = OWNERS[thing]
    found = {
        path.relative_to(PACKAGE).as_posix(): names
        for path in PACKAGE.rglob("*.py")
        if (names := found_in(path.read_text(encoding="utf-8"), classes, attributes))
    }
    assert list(found) == [owner], found
    assert classes | attributes == set(found[owner])


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("orders.append(Pause('r', 's'))", ["Pause"]),
        ("messages.Pause('r', 's')", ["Pause"]),
        ("self.sequence.is_writing = False", ["is_writing"]),
        ("job.is_writing: bool = True", ["is_writing"]),
        ("sequence.is_writing |= True", ["is_writing"]),
        ("if sequence.is_writing: isinstance(order, Pause)", []),
    ],
)
def test_the_rule_finds_a_second_owner(source: str, expected: list[str]) -> None:
    assert found_in(source, {"Pause"}, {"is_writing"}) == expected
