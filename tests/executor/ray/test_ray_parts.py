"""What of stages on Ray needs no Ray: keys of a config, frames, and what is said where the package is missing."""

from __future__ import annotations

import math
import sys
import warnings
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from support.toy_engine import toy_config, toy_stage

from vllm_omni.config.loader import load_config
from vllm_omni.config.schema import RayConfig, RayStageConfig
from vllm_omni.errors import ConfigError
from vllm_omni.executor.omni_executor import OmniExecutor
from vllm_omni.executor.orders import FeedChunk
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.executor.ray.cluster import resources_of
from vllm_omni.executor.ray.frame import memory_of, opened, opened_remotely, packed
from vllm_omni.executor.ray.protocol import actor_types
from vllm_omni.executor.ray.remote_tensor import Piece, RemoteTensor, content_of
from vllm_omni.executor.row_buffer import RowBuffer
from vllm_omni.executor.wire.base import INLINE_BYTES, WireError
from vllm_omni.payload import RowRange, StreamChunk

TYPES = actor_types()


def test_overrides_say_where_ray_is_and_what_a_stage_asks_of_it() -> None:
    overrides = ["executor=ray", "ray.address=10.0.0.1:6379", "image.ray={num_cpus: 2, resources: {fast: 1}}"]
    config = load_config("tiny_image", overrides)
    assert config.ray == RayConfig(address="10.0.0.1:6379")
    image, text = config.stages["image"], config.stages["text"]
    assert image.ray == RayStageConfig(num_cpus=2.0, resources={"fast": 1.0}) and image.executor == "ray"
    assert text.ray == RayStageConfig()
    assert resources_of(toy_stage("text", "toy_text", ray=image.ray)) == {"CPU": 2.0, "fast": 1.0}
    assert resources_of(toy_stage("text", "toy_text", ray=RayStageConfig(num_cpus=0, num_gpus=0.5))) == {"GPU": 0.5}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("image.ray.num_cpus=-1", "stages.image.ray.num_cpus: got -1"),
        ("image.ray.num_gpus=1e9", "stages.image.ray.num_gpus: got 1000000000"),
        ("image.ray.resources={fast: 0}", "stages.image.ray.resources.fast: got 0"),
        ("image.ray.gpus=1", "stages.image.ray.gpus: unknown key"),
        ("ray.adress=x", "ray.adress: unknown key (did you mean 'address'?)"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(override: str, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config("tiny_image", [override])
    assert words in str(refused.value)


def test_without_the_package_the_fix_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    config = toy_config(stages={"text": toy_stage("text", "toy_text", executor="ray")}, outputs=("text",))
    with pytest.raises(ConfigError, match=r"Ray is not installed; pip install 'vllm-omni\[ray\]'"):
        OmniExecutor(Pipeline(config))


def of(tensor: torch.Tensor) -> FeedChunk:
    return FeedChunk("r", "port", StreamChunk(tensor, 0, len(tensor), is_last=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(0, 3), (5, 3), (1, 300, 700)])
def test_tensors_pass_whole_large_ones_where_they_lie(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.arange(math.prod(shape)).reshape(shape).to(dtype)
    body, *arrays = packed(of(tensor), TYPES)
    assert isinstance(body, bytes) and len(arrays) == (tensor.nbytes > INLINE_BYTES)
    for array in arrays:
        assert array.dtype == np.uint8 and array.ctypes.data == tensor.data_ptr()
        array.flags.writeable = False  # as Ray's object store gives them
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = opened([body, *arrays], TYPES).chunk.rows
    assert found.dtype == dtype and torch.equal(found, tensor)
    assert not arrays or found.data_ptr() == tensor.data_ptr()


def test_tensors_out_of_order_pass_whole() -> None:
    tensor = torch.arange(60_000).reshape(200, 300).T
    found = opened(packed(of(tensor), TYPES), TYPES).chunk.rows
    assert torch.equal(found, tensor)


BODY, ARRAY = packed(of(torch.arange(10_000)), TYPES)


@pytest.mark.parametrize(
    "frame",
    [
        [],
        [b""],
        [b"\xc1", ARRAY],
        [BODY],
        [BODY, ARRAY[:100]],
        [BODY, ARRAY.view(np.int64)],
        [BODY, ARRAY.reshape(2, -1)],
        [BODY, BODY],
        [msgpack.packb([[], 7]), ARRAY],
    ],
    ids=range(9),
)
def test_what_is_no_frame_is_refused(frame: list[Any]) -> None:
    with pytest.raises(WireError):
        opened(frame, TYPES)


def never(found: Any) -> torch.Tensor:
    raise AssertionError("the loop has looked into a tensor that only actors read")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_rows_of_one_actor_reach_another_without_their_content_passing_the_loop(dtype: torch.dtype) -> None:
    """Chunks that are cut from several pushes, with context before and behind, as a streamed edge has them."""
    pushed = [
        torch.arange(start * 900, (start + count) * 900).reshape(count, 900) for start, count in ((0, 40), (40, 25))
    ]
    whole = torch.cat(pushed).to(dtype)
    buffer = RowBuffer()
    for rows in pushed:
        remote = opened_remotely(packed(of(rows.to(dtype)), TYPES), TYPES, never).chunk.rows
        assert isinstance(remote, RemoteTensor) and remote.shape == rows.shape and remote.dtype == dtype
        buffer.push(remote)
    for wanted in (RowRange(0, 10), RowRange(10, 45, 10, 2), RowRange(45, 65, 3, is_last=True)):
        chunk = buffer.cut(wanted)
        buffer.compact()
        assert isinstance(chunk.rows, RemoteTensor)
        frame = packed(FeedChunk("r", "port", chunk), TYPES)
        found = opened(frame, TYPES).chunk
        assert torch.equal(found.rows, whole[wanted.start - wanted.num_before : wanted.stop + wanted.num_after])
        assert (found.start, found.is_last) == (wanted.start, wanted.is_last)


def test_whoever_computes_with_a_remote_tensor_computes_with_its_content() -> None:
    rows = torch.randn(30, 400)
    remote = opened_remotely(packed(of(rows), TYPES), TYPES, lambda array: memory_of(array)()).chunk.rows
    assert torch.equal(remote[3:7] * 2, rows[3:7] * 2) and torch.equal(remote[4], rows[4])
    assert torch.equal(torch.cat([remote[:5], rows[5:]]), rows) and torch.equal(remote[::2], rows[::2])
    assert np.array_equal(remote.detach().cpu().contiguous().numpy(), rows.numpy())
    assert type(remote.clone()) is torch.Tensor


@pytest.mark.parametrize(
    "pieces", [[[0, 0, 10]], [[1, 0, 40_000]], [[0, 70_000, 40_000]], [[0, -8, 80_000]], [7], [[0, 0]]]
)
def test_pieces_that_are_none_are_refused(pieces: Any) -> None:
    entries, body = msgpack.unpackb(BODY)
    entries[0][2:] = [pieces]
    with pytest.raises(WireError):
        opened([msgpack.packb([entries, body]), ARRAY], TYPES)


def test_no_rows_of_a_remote_tensor_are_no_rows() -> None:
    def fetch(found: object) -> torch.Tensor:
        raise AssertionError("nothing has to be fetched")

    remote = RemoteTensor([Piece("object", 0, 24)], (3, 2), torch.float32, fetch)
    empty = content_of(remote[1:1])
    assert empty.shape == (0, 2) and empty.dtype == torch.float32 and type(empty) is torch.Tensor
