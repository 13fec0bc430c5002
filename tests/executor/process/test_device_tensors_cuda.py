"""On a GPU: tensors go from process to process by handles of the driver, whole, and without a copy in the host."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from benchmarks.hop_stages import hop_bytes, hop_config
from vllm_omni import Omni
from vllm_omni.utils.device import is_cuda

pytestmark = pytest.mark.cuda
SIZES = (2**20 + 3, 2**26, 2**20 + 3)


@pytest.mark.parametrize("through_host", [False, True])
def test_tensors_of_a_gpu_reach_another_process_whole(gpu: torch.device, through_host: bool) -> None:
    with Omni(hop_config("process", str(gpu), through_host=through_host), progress=False) as omni:
        for size in SIZES:
            (output,) = omni.generate(str(size))
            assert output.error is None, output.error
            assert output.tensors["sink.bytes"].tolist() == [size, int(hop_bytes(size).sum(dtype=torch.int64))]
            if through_host:
                assert torch.equal(output.tensors["source.bytes"].cpu(), hop_bytes(size))
        segments = omni._executor._commons.segments
        assert bool(segments.num_bytes) is (through_host or not is_cuda(gpu))


def test_a_giver_that_is_killed_is_replaced_and_its_tensors_are_made_anew(gpu: torch.device) -> None:
    if not is_cuda(gpu):
        pytest.skip("deaths of processes without a GPU have their own tests")
    with Omni(hop_config("process", str(gpu)), progress=False) as omni:
        (before,) = omni.generate(str(SIZES[0]))
        (replica,) = omni.get_status()["stages"]["source"]["replicas"]
        os.kill(replica["pid"], signal.SIGKILL)
        (after,) = omni.generate(str(SIZES[0]))
        assert before.error is None and after.error is None, after.error
        assert before.tensors["sink.bytes"].tolist() == after.tensors["sink.bytes"].tolist()
