"""Video pipelines through the adapter: frames equal diffusers' own, alone and in a crowd; limits before work; abort and
deadline between steps; the rate, and the sound that goes with the frames.
"""

from __future__ import annotations

import functools
import inspect
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from support.diffusers_folders import engine, made, run, step, task
from support.tiny_pipelines import save, stable_diffusion
from support.tiny_videos import NUM_FRAMES, SIDE, animate_diff, cogvideox, has_wan, ltx, wan

from vllm_omni import DiffusionParams, Omni, OmniOutput, RequestStatus
from vllm_omni.config.schema import LimitsConfig
from vllm_omni.engine.base import ReadPorts
from vllm_omni.engine.diffusers.engine import DiffusersEngine
from vllm_omni.engine.diffusers.pipeline_class import given_kind, gives_soundtrack, pipeline_class, shown_frame_rate
from vllm_omni.engine.diffusers.pipeline_result import result_tensor
from vllm_omni.engine.diffusers.spec import DiffusersSpec
from vllm_omni.entrypoints.cli.graph_report import describe
from vllm_omni.entrypoints.loading import open_pipeline
from vllm_omni.errors import InvalidRequestError, RequestTimeoutError, StageError
from vllm_omni.executor.memory import plan_memory
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.messages import StageDone, StageProgress

MAKERS: dict[str, Callable[[], Any]] = {
    "ltx": ltx,
    "ltx image": lambda: ltx("LTXImageToVideoPipeline"),
    "cogvideox": cogvideox,
    "animatediff": animate_diff,
    "wan": wan,
}
RATES = {"ltx": 25.0, "ltx image": 25.0, "cogvideox": 8.0, "animatediff": 10.0, "wan": 16.0}
NAMES = [
    "ltx",
    "cogvideox",
    "animatediff",
    pytest.param("wan", marks=pytest.mark.skipif(not has_wan(), reason="diffusers loads Wan with accelerate and ftfy")),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders by name, each made once."""

    @functools.cache
    def folder(name: str) -> Path:
        torch.manual_seed(0)
        path = tmp_path_factory.mktemp(name.replace(" ", "-"))
        save(MAKERS[name](), path)
        return path

    return folder


@pytest.fixture(scope="module")
def films(folders: Callable[[str], Path]) -> DiffusersEngine:
    return engine(folders("ltx"), "video")


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name.endswith("Pipeline call")]


def small(seed: int = 1, **rest: Any) -> DiffusionParams:
    sizes = {"num_inference_steps": 2, "height": SIDE, "width": SIDE, "num_frames": NUM_FRAMES}
    return DiffusionParams(**{"seed": seed, **sizes, **rest})


def plain(folder: Path) -> Any:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def frames_of(pipeline: Any, prompt: str, *seeds: int, **arguments: Any) -> np.ndarray:
    """uint8 [N, n, H, W, 3], as plain diffusers gives pictures of the frames."""
    settings = {"height": SIDE, "width": SIDE, "num_frames": NUM_FRAMES, "num_inference_steps": 2, **arguments}
    several = {"num_videos_per_prompt": len(seeds)} if len(seeds) > 1 else {}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    result = pipeline(prompt=prompt, generator=generators, output_type="pil", **several, **settings)
    return np.stack([[np.asarray(frame) for frame in video] for video in result.frames])


def loaded(folder: Path, **keys: Any) -> Omni:
    stage = {"kind": "diffusers", "model": str(folder), **keys}
    return Omni({"stages": {"s": stage}, "outputs": ["s"]}, progress=False)


def stacked(output: OmniOutput) -> np.ndarray:
    assert output.error is None, output.error
    return np.stack([video.frames for video in output.videos])


# What is made


@pytest.mark.parametrize("name", NAMES)
def test_frames_are_the_pipelines_own_alone_and_in_a_crowd(folders: Callable[[str], Path], name: str) -> None:
    folder = folders(name)
    expected = frames_of(plain(folder), "a cat", 3)
    with loaded(folder) as omni:
        (alone,) = omni.generate("a cat", small(3))
        crowd = omni.generate(["a dog", "a cat", "a cow"], [small(8), small(3), small(3, num_inference_steps=3)])
    assert expected.shape == (1, NUM_FRAMES, SIDE, SIDE, 3) and np.ptp(expected) > 50
    assert np.array_equal(stacked(alone), expected) and np.array_equal(stacked(crowd[1]), expected)
    assert not np.array_equal(stacked(crowd[0]), expected)
    assert [video.fps for video in alone.videos] == [RATES[name]] and alone.images == []


def test_a_seed_plus_i_makes_video_i(folders: Callable[[str], Path]) -> None:
    with loaded(folders("ltx")) as omni:
        both, second = omni.generate(["a cat"] * 2, [small(7, num_outputs=2), small(8)])
    assert np.array_equal(stacked(both), frames_of(plain(folders("ltx")), "a cat", 7, 8))
    difference = np.abs(stacked(both)[1].astype(int) - stacked(second)[0])
    assert difference.max() <= 1, "beside another one products are added up in another order"


@pytest.mark.parametrize("name", ["cogvideox", "animatediff"])
def test_a_pipeline_that_makes_one_video_at_a_time_is_not_asked_for_more(
    folders: Callable[[str], Path], name: str
) -> None:
    """Its signature has a number of videos, and its code overwrites it."""
    with loaded(folders(name)) as omni:
        (output,) = omni.generate("a cat", small(num_outputs=2))
    assert isinstance(output.error, InvalidRequestError) and "num_outputs: got 2" in str(output.error)


def test_a_video_begins_with_the_picture_that_is_given(folders: Callable[[str], Path]) -> None:
    folder = folders("ltx image")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
    expected = frames_of(plain(folder), "a cat", 3, image=picture)
    with loaded(folder) as omni:
        given, other = omni.generate(
            [{"prompt": "a cat", "image": picture}, "a cat"], [small(3), small(3, image=Image.new("RGB", (SIDE, SIDE)))]
        )
    assert np.array_equal(stacked(given), expected) and not np.array_equal(stacked(other), expected)


def test_every_step_is_told(films: DiffusersEngine) -> None:
    films.submit(task("x", "a cat", small(num_inference_steps=4)))
    events = run(films)
    assert [(e.step, e.num_steps) for e in events if isinstance(e, StageProgress)] == [(n, 4) for n in (1, 2, 3, 4)]
    done = events[-1]
    assert isinstance(done, StageDone) and done.payload.meta == {"fps": 25.0} and done.metrics["steps"] == 4


def test_frames_are_bytes_when_they_leave_the_pipeline(films: DiffusersEngine) -> None:
    films.submit(task("x", "a cat", small()))
    frames = made(run(films), "video")["x"]
    assert frames.dtype == torch.uint8 and frames.shape == (1, NUM_FRAMES, SIDE, SIDE, 3)


# The rate


def test_the_rate_of_a_request_reaches_pipeline_and_file(folders: Callable[[str], Path]) -> None:
    with loaded(folders("ltx")) as omni:
        usual, slow = omni.generate(["a cat"] * 2, [small(3), small(3, fps=12)])
    assert (usual.videos[0].fps, slow.videos[0].fps) == (25.0, 12.0)
    expected = frames_of(plain(folders("ltx")), "a cat", 3, frame_rate=12)
    assert np.array_equal(stacked(slow), expected) and not np.array_equal(stacked(usual), expected)


def test_a_pipeline_that_knows_no_rate_leaves_it_to_the_file(folders: Callable[[str], Path]) -> None:
    with loaded(folders("cogvideox"), defaults={"fps": 6}) as omni:
        usual, fast = omni.generate(["a cat"] * 2, [small(3), small(3, fps=12.5)])
    assert (usual.videos[0].fps, fast.videos[0].fps) == (6.0, 12.5)
    assert np.array_equal(stacked(usual), stacked(fast))


def test_the_documentation_of_a_class_says_its_rate() -> None:
    rates = {
        "CogVideoXPipeline": 8.0,
        "HunyuanVideoPipeline": 15.0,
        "StableVideoDiffusionPipeline": 7.0,
        "Kandinsky5T2VPipeline": 24.0,
        "AnimateDiffPipeline": None,
    }
    assert {name: shown_frame_rate(pipeline_class(name)) for name in rates} == rates


def test_check_says_what_a_folder_gives_and_how_fast(folders: Callable[[str], Path]) -> None:
    pipeline = Pipeline(open_pipeline(model=str(folders("cogvideox"))).config)
    report = " ".join(describe(pipeline, plan_memory(pipeline)).split())
    assert "CogVideoXPipeline of diffusers, hosted as it is (gives video, 8 frames a second)" in report
    assert "out video [N, n, H, W, 3] => result" in report


# Sound


def test_classes_that_give_sound_with_their_frames_are_known() -> None:
    kinds = {"LTX2Pipeline": True, "Kandinsky6TI2VAPipeline": True, "LTXPipeline": False, "MochiPipeline": False}
    assert {given_kind(pipeline_class(name)) for name in kinds} == {"video"}
    assert {name: gives_soundtrack(pipeline_class(name)) for name in kinds} == kinds


def test_the_sound_of_a_result_goes_with_its_video(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipeline with sound is too large to be made here: the sound is put beside the frames of another."""
    tone = torch.sin(torch.arange(1600) / 10)[None, None].expand(1, 2, -1) * 0.5
    whole = diffusers.LTXPipeline.__call__

    def call(self: Any, *arguments: Any, **rest: Any) -> Any:
        return types.SimpleNamespace(frames=whole(self, *arguments, **rest).frames, audio=tone)

    call.__signature__ = inspect.signature(whole)  # type: ignore[attr-defined]
    monkeypatch.setattr(diffusers.LTXPipeline, "__call__", call)
    monkeypatch.setattr("vllm_omni.engine.diffusers.spec.gives_soundtrack", lambda pipeline: True)
    monkeypatch.setattr("vllm_omni.engine.diffusers.engine.sample_rate", lambda pipeline: 4000)
    with loaded(folders("ltx"), output="video") as omni:
        (output,) = omni.generate("a cat", small(3))
    assert output.error is None, output.error
    sound = output.videos[0].audio
    assert sound is not None and sound.sample_rate == 4000 and np.array_equal(sound.samples, tone[0].numpy())
    assert output.audios == [], "it is the video's"


# Limits

BAD: list[tuple[dict[str, Any], str]] = [
    ({"num_frames": 65}, r"num_frames: got 65, expected at least 1 and at most 64 .*limits"),
    ({"num_frames": 0}, "num_frames: got 0"),
    ({"num_frames": 33, "num_outputs": 2}, r"num_outputs \* num_frames \* height \* width: got 67584, .* 33792"),
    ({"height": 64, "width": 64, "num_frames": 9}, r"num_frames \* height \* width: got 36864"),
    ({"height": 128, "width": 128, "num_frames": 1}, r"height \* width: got 16384, .* at most 4096"),
    ({"num_frames": None}, r"num_frames: got 161, .* at most 64"),
    ({"fps": 1000}, "fps: got 1000, expected"),
    ({"fps": float("nan")}, "fps"),
    ({"extra": {"num_frames": 9}}, r"extra\.num_frames: got 9; set the parameter num_frames instead"),
    ({"extra": {"frame_rate": 9}}, r"extra\.frame_rate: got 9; set the parameter fps instead"),
    ({"extra": {"output_type": "np"}}, r"extra\.output_type: unknown key"),
]


@pytest.mark.parametrize(("bad", "message"), BAD, ids=[message[:24] for _, message in BAD])
def test_what_is_too_much_is_refused_before_work(
    folders: Callable[[str], Path], bad: dict[str, Any], message: str
) -> None:
    limits = LimitsConfig(max_frames=64, max_pixels=64 * 64, max_total_pixels=33 * SIDE * SIDE)
    spec = engine(folders("ltx"), "video", limits=limits).spec
    assert isinstance(spec, DiffusersSpec)
    with pytest.raises(InvalidRequestError, match=message):
        spec.check(task("x", "a cat", small(**bad)).request, small(**bad), ReadPorts())


def test_stages_that_make_no_video_refuse_its_length_and_rate(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save(stable_diffusion(), tmp_path)
    for config in ({"stages": {"s": {"kind": "diffusers", "model": str(tmp_path)}}, "outputs": ["s"]}, "tiny_image"):
        with Omni(config, progress=False) as omni:
            for name in ("num_frames", "fps"):
                (output,) = omni.generate("a cat", DiffusionParams(**{name: 8}))
                assert isinstance(output.error, InvalidRequestError) and str(output.error).startswith(f"{name}: ")


# Ends on the way


def test_an_abort_on_the_way_ends_the_call_and_harms_no_other(films: DiffusersEngine) -> None:
    films.submit(task("after", "a cat", small(4)))
    expected = made(run(films), "video")["after"]
    films.submit(task("gone", "a dog", small(3, num_inference_steps=50)))
    films.submit(task("after", "a cat", small(4)))
    for _ in range(2):
        assert [event.request_id for event in step(films)] == ["gone"]
    films.abort("gone")
    assert films.get_stats() == {"running": 0, "queued": 1}
    assert torch.equal(made(run(films), "video")["after"], expected)


def test_a_deadline_acts_between_steps_and_the_next_request_runs(folders: Callable[[str], Path]) -> None:
    with loaded(folders("ltx")) as omni:
        late, fine = omni.generate(
            [{"prompt": "a cat", "timeout_s": 0.2}, "a cat"], [small(num_inference_steps=1000), small()]
        )
    assert isinstance(late.error, RequestTimeoutError) and late.videos == []
    assert fine.status is RequestStatus.FINISHED and len(fine.videos) == 1


def test_a_stream_gives_the_video_once_and_ends_with_it(folders: Callable[[str], Path]) -> None:
    with loaded(folders("ltx")) as omni:
        parts = list(omni.stream("a cat", small()))
    assert [len(part.videos) for part in parts if part.videos] == [1] and parts[-1].finished
    assert parts[0].progress["s"].num_steps == 2


# What pipelines return


def test_frames_are_read_whatever_holds_them() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, 3, 4, 8, 3), dtype=np.uint8)
    pictures = [[Image.fromarray(frame) for frame in video] for video in pixels]
    floats = pixels / 255
    channels_first = torch.from_numpy(floats).permute(0, 1, 4, 2, 3)
    for name, frames, count in (
        ("pictures", pictures, 2),
        ("arrays", floats, 2),
        ("a tensor", channels_first, 2),
        ("a tensor in half", channels_first.bfloat16(), 2),
        ("arrays in a list", list(floats), 2),
        ("pictures of one", pictures[0], 1),
        ("an array of one", floats[0], 1),
        ("a tensor of one", channels_first[0], 1),
        ("frames of one", list(floats[0]), 1),
    ):
        got = result_tensor(types.SimpleNamespace(frames=frames), "video")
        assert got.shape == (count, 3, 4, 8, 3) and got.dtype == torch.uint8, name
        assert np.abs(got.numpy().astype(int) - pixels[:count]).max() <= (1 if "half" in name else 0), name
    uneven = [pictures[0], pictures[1][:2]]
    for bad in ([], [[]], np.full((1, 2, 4, 4, 3), np.nan), uneven, [[pictures[0][0], Image.new("RGB", (4, 4))]]):
        with pytest.raises(StageError):
            result_tensor(types.SimpleNamespace(frames=bad), "video")


MEASURE = """
import types
import torch
from vllm_omni.engine.diffusers.pipeline_result import result_tensor

def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

frames = torch.rand(1, 240, 3, 256, 256)
result_tensor(types.SimpleNamespace(frames=frames[:, :1]), "video")
open("/proc/self/clear_refs", "w").write("5")  # forgets the peak
before = kilobytes("VmRSS:")
made = result_tensor(types.SimpleNamespace(frames=frames), "video")
print(made.numel() // 1024, kilobytes("VmHWM:") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc")
def test_frames_become_bytes_in_the_room_of_the_bytes() -> None:
    """240 frames of 256x256 pixels, which are 180 MiB as floats."""
    measured = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    frames, peak = map(int, measured.stdout.split())
    assert peak < 1.25 * frames, f"{peak} kB for {frames} kB of frames"
