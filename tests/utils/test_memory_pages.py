"""What the system says of memory that was asked for in huge pages."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vllm_omni.utils.memory_pages import HUGE_PAGE, in_huge_pages

MAPS = Path("/proc/self/smaps")
SUPPORT = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def flags_of(tensor: Tensor) -> list[str]:
    """Those of the mapping in which the tensor's middle lies."""
    middle = tensor.data_ptr() + tensor.numel() * tensor.itemsize // 2
    is_within = False
    for line in MAPS.read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            is_within = int(bounds[1], 16) <= middle < int(bounds[2], 16)
        elif is_within and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"no mapping holds {middle:#x}")


@pytest.mark.skipif(sys.platform != "linux" or not SUPPORT.exists(), reason="the system has no such pages")
def test_large_memory_is_asked_for_in_huge_pages() -> None:
    plain = torch.empty(16 * HUGE_PAGE, dtype=torch.uint8)
    assert "hg" not in flags_of(plain)
    huge = in_huge_pages(torch.empty(16 * HUGE_PAGE, dtype=torch.uint8))
    assert "hg" in flags_of(huge)
    huge.fill_(7)
    assert int(huge.long().sum()) == 7 * 16 * HUGE_PAGE


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_small_or_has_no_memory_stays_as_it_is(device: str) -> None:
    tensor = torch.empty(8, device=device)
    assert in_huge_pages(tensor) is tensor
    large = torch.empty(HUGE_PAGE, device=device)
    assert in_huge_pages(large) is large
