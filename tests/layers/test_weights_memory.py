"""Loading holds the weights, and of the files little more than one tensor."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

MIB = 2**20
SCRIPT = """
import resource, sys
from pathlib import Path
import torch
from torch import nn
from vllm_omni.layers.weights import Target, load_weights

class Model(nn.ModuleList):
    def locate(self, name):
        return Target(name)
    def is_ignored(self, name):
        return False

model = Model(nn.Linear(1024, 1024, bias=False) for _ in range(int(sys.argv[2])))
for parameter in model.parameters():
    parameter.data.zero_()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
load_weights(model, Path(sys.argv[1]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, float(sum(p.sum() for p in model.parameters())))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="tells the system of pages that it may have back")
def test_a_file_that_is_read_is_not_held_beside_the_weights(tmp_path: Path) -> None:
    count = 32  # of 4 MiB each
    save_file({f"{index}.weight": torch.ones(1024, 1024) for index in range(count)}, tmp_path / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), str(count)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    more_kib, total = done.stdout.split()
    assert float(total) == count * MIB
    assert int(more_kib) < 32 * 1024, "a quarter of the file"
