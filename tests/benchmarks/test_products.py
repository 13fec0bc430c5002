"""Products are timed in every way that is there, and compared with the better of the others."""

from __future__ import annotations

import pytest
import torch
from support.sides import SideHere

from benchmarks import products
from benchmarks.measure import Options
from vllm_omni.layers.native.library import kernels


def test_every_way_is_timed_and_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "SideProcess", SideHere)
    report = products.run(Options(threads=1, is_quick=True))
    found = [each for each in report.figures["products"] if each["dtype"] == "float32"]
    assert [each["rows"] for each in found] == [1, 8]
    for row, each in zip(report.tables[0].rows, found, strict=True):
        seconds = each["seconds"]
        assert min(seconds.values()) > 0 and products.TORCH in seconds
        assert (products.OURS in seconds) == (kernels(torch.float32) is not None)
        if products.OURS in seconds:
            better = min(value for name, value in seconds.items() if name != products.OURS)
            assert row[-1] == f"{better / seconds[products.OURS]:.2f}"
