"""Files of the command line: refused before the work where they could not be, whole or not there, never lost, named for
what they are, and saying how they were made.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny_pipelines import save
from support.tiny_videos import ltx

from vllm_omni import Audio, Video
from vllm_omni.entrypoints.cli import main
from vllm_omni.entrypoints.cli.output_files import OutputFiles
from vllm_omni.errors import ConfigError, StageError
from vllm_omni.media.file_info import read_file_info
from vllm_omni.request import Completion, OmniOutput, RequestStatus, StageResult

TWO_SCENES = """
name: two
model: asset://tiny-image
stages:
  text: {kind: ar, model: "${model}/text_encoder", task: encode, outputs: {hidden_states: {layers: [-2]}}}
  sketch: {kind: dit, model: "${model}", inputs: {prompt_embeds: text.hidden_states}, defaults: {guidance_scale: 0}}
  drawing: {kind: dit, model: "${model}", inputs: {prompt_embeds: text.hidden_states}, defaults: {guidance_scale: 0}}
outputs: [sketch, drawing]
"""


def image() -> Image.Image:
    return Image.new("RGB", (4, 4), (9, 9, 9))


def output(error: StageError | None = None, **results: StageResult) -> OmniOutput:
    status = RequestStatus.FAILED if error else RequestStatus.FINISHED
    return OmniOutput(request_id="r", status=status, results=results, error=error)


def pictures(count: int = 1) -> StageResult:
    return StageResult(images=tuple(image() for _ in range(count)))


def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_omni.entrypoints.omni.Omni.__init__", lambda *_, **__: pytest.fail("work began"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Before the work


@pytest.mark.parametrize(
    ("config", "name", "words"),
    [
        ("tiny_image", "x.wav", "but the config gives image; give a folder"),
        ("tiny_image", "x.json", "but the config gives image"),
        ("tiny_audio", "x.png", "but the config gives audio"),
        ("tiny_image", "x.opus", "but the config gives image"),
    ],
)
def test_a_file_of_a_kind_that_the_config_does_not_give_is_refused_before_the_work(
    config: str,
    name: str,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    no_work(monkeypatch)
    assert main(["generate", "a red circle", "--config", config, "-o", f"{tmp_path}/{name}"]) == 1
    assert words in capsys.readouterr().err and not names(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("file/", "a file stands in the place of a folder"),
        ("file", "a file stands in the place of a folder"),
        ("file/deep/x.png", "Not a directory"),
        ("x" * 252 + ".png", "File name too long"),
        ("x" * 300, "File name too long"),
    ],
)
def test_a_place_that_cannot_be_is_refused_in_words_before_the_work(
    name: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    no_work(monkeypatch)
    assert main(["generate", "a red circle", "-o", f"{tmp_path}/{name}"]) == 1
    shown = capsys.readouterr().err
    assert words in shown and "cannot be " in shown and (tmp_path / "file").read_text() == "mine"
    assert names(tmp_path) == ["file"]


def test_the_default_place_is_looked_at_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    no_work(monkeypatch)
    assert main(["generate", "a red circle"]) == 1
    assert "cannot be written (No such file or directory)" in capsys.readouterr().err


# Whole or not there, and never lost


def refuge_of(error: str) -> Path:
    found = re.search(r"it is in (\S+) instead", error)
    assert found, error
    return Path(found[1])


def test_a_device_that_is_full_costs_no_result(tmp_path: Path) -> None:
    (tmp_path / "0.png").symlink_to("/dev/full")
    told: list[Path] = []
    with pytest.raises(ConfigError, match="cannot be written \\(No space left on device\\)") as caught:
        OutputFiles(f"{tmp_path}/").write([output(a=pictures()), output(a=pictures())], announce=told.append)
    assert Image.open(refuge_of(str(caught.value))).size == (4, 4)
    assert told == [tmp_path / "1.png"] and Image.open(told[0]).size == (4, 4)
    assert names(tmp_path) == ["0.png", "1.png"] and (tmp_path / "0.png").is_symlink()


def test_a_file_that_grows_too_large_is_not_there_at_all_and_the_old_one_stays(tmp_path: Path) -> None:
    script = (
        "import resource, sys; from PIL import Image; from pathlib import Path; import numpy\n"
        "from vllm_omni.entrypoints.cli.output_files import OutputFiles\n"
        "from vllm_omni.request import OmniOutput, RequestStatus, StageResult\n"
        "noise = Image.fromarray(numpy.random.default_rng(0).integers(0, 255, (90, 90, 3), dtype=numpy.uint8))\n"
        "results = {'a': StageResult(images=(noise,))}\n"
        "output = OmniOutput(request_id='r', status=RequestStatus.FINISHED, results=results)\n"
        "files = OutputFiles(sys.argv[1]); files.write([output])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "files.write([output])"
    )
    path = tmp_path / "x.png"
    path.write_bytes(b"old")
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        preexec_fn=lambda: signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
    )
    assert "cannot be written (File too large), nor in" in done.stderr and "it is lost" in done.stderr
    assert names(tmp_path) == ["x.png"] and Image.open(path).size == (90, 90)


def test_a_folder_that_is_taken_away_meanwhile_costs_no_result(tmp_path: Path) -> None:
    files = OutputFiles(f"{tmp_path}/answers/x.png")
    files.ensure_writable()
    (tmp_path / "answers").rmdir()
    (tmp_path / "answers").write_text("in the way")
    with pytest.raises(ConfigError) as caught:
        files.write([output(a=pictures(2))])
    found = refuge_of(str(caught.value))
    assert names(found.parent) == ["x-0.png", "x-1.png"]


def test_a_link_stays_one_and_rights_stay_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "real.png").write_bytes(b"old")
    (tmp_path / "real.png").chmod(0o640)
    (tmp_path / "link.png").symlink_to("real.png")
    OutputFiles(f"{tmp_path}/link.png").write([output(a=pictures())])
    assert (tmp_path / "link.png").is_symlink() and Image.open(tmp_path / "real.png").size == (4, 4)
    assert (tmp_path / "real.png").stat().st_mode & 0o777 == 0o640


def test_what_a_format_does_not_hold_comes_in_another(tmp_path: Path) -> None:
    wide = StageResult(images=(Image.new("RGB", (20_000, 1)),), audios=(Audio(np.zeros((3, 9), np.float32), 8000),))
    with pytest.raises(ConfigError, match="webp: a picture of 20000x1 pixels"):
        OutputFiles(f"{tmp_path}/x.webp").write([output(a=wide)])
    with pytest.raises(ConfigError, match="mp3: got 3 channels"):
        OutputFiles(f"{tmp_path}/y.mp3").write([output(a=wide)])
    assert names(tmp_path) == ["x.png", "x.wav", "y.png", "y.wav"]


def test_one_that_was_asked_for_and_not_made_costs_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="but no answer holds audio"):
        OutputFiles(f"{tmp_path}/x.wav").write([output(a=pictures())])
    assert names(tmp_path) == ["x.png"]


# Names


def written(target: str, *outputs: OmniOutput) -> list[str]:
    files = OutputFiles(target)
    files.expect({"sketch": {"image"}, "drawing": {"image"}, "song": {"audio"}})
    return [path.name for path in files.write(list(outputs))]


def test_names_are_the_same_whatever_ran(tmp_path: Path) -> None:
    song = StageResult(audios=(Audio(np.zeros((1, 9), np.float32), 8000),))
    both = output(sketch=pictures(), drawing=pictures(), song=song)
    folder, file = f"{tmp_path}/", f"{tmp_path}/x.webp"
    assert written(folder, both) == ["0-sketch.png", "0-drawing.png", "0.wav"]
    assert written(folder, output(), output(drawing=pictures())) == ["1-drawing.png"]
    assert written(folder, output(drawing=pictures(2))) == ["0-drawing-0.png", "0-drawing-1.png"]
    assert written(file, both) == ["x-sketch.webp", "x-drawing.webp", "x.wav"]
    assert written(file, output(StageError("no")), output(drawing=pictures())) == ["x-1-drawing.webp"]
    assert written(file, both, output(sketch=pictures(2), song=song)) == [
        "x-0-sketch.webp",
        "x-0-drawing.webp",
        "x-1-sketch-0.webp",
        "x-1-sketch-1.webp",
        "x-0.wav",
        "x-1.wav",
    ]


def test_two_picture_stages_of_the_command_line_are_told_apart(tmp_path: Path) -> None:
    config = tmp_path / "two.yaml"
    config.write_text(TWO_SCENES)
    arguments = ["generate", "a red circle", "--config", str(config), "--steps", "1", "-q", "-o", f"{tmp_path}/out/"]
    assert main(arguments) == 0
    assert names(tmp_path / "out") == ["0-drawing.png", "0-sketch.png"]


# What they say


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".avif", ".tiff"])
def test_a_picture_is_made_again_by_what_its_file_says(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, again = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    words = ["generate", "a red circle", "--config", "tiny_image", "--steps", "2"]
    assert main([*words, "--n", "2", "-o", str(first)]) == 0
    told = re.search(r"^seed (\d+)$", capsys.readouterr().err, re.MULTILINE)
    second = first.with_stem("a-1")
    found = read_file_info(second).metadata
    assert told and found and found.seed == int(told[1]) + 1 and found.version and found.model == "asset://tiny-image"
    assert found.prompt == "a red circle"
    assert found.parameters["num_inference_steps"] == 2 and re.fullmatch(r"\d+x\d+", found.parameters["size"])
    assert main([*words, "--seed", str(found.seed), "-o", str(again)]) == 0
    assert "seed" not in capsys.readouterr().err
    assert np.array_equal(np.asarray(Image.open(second)), np.asarray(Image.open(again)))
    assert main(["info", str(second)]) == 0
    shown = capsys.readouterr().out
    for line in (
        "  prompt: a red circle",
        f"  seed: {found.seed}",
        "  num_inference_steps: 2",
    ):
        assert line in shown.split("\n")


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3", ".opus", ".aac"])
def test_the_prompt_can_be_kept_out_of_a_file(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"x{suffix}"
    words = ["generate", "C4 then E4, square, fast", "--config", "tiny_audio", "--steps", "1"]
    words += ["--input", "duration_s=2", "-o", str(path), "--seed", "5"]
    assert main([*words, "--no-prompt-metadata"]) == 0
    content = path.read_bytes()
    assert not any(word in content for word in (b"C4 then", b"square"))
    assert main(["info", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "seed: 5" in shown and "duration_s: 2" in shown and "prompt:" not in shown
    assert main(words) == 0
    assert main(["info", str(path)]) == 0
    assert "prompt: C4 then E4, square, fast" in capsys.readouterr().out


def test_info_says_what_is_no_picture_and_no_sound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.png").write_bytes(b"not at all")
    image().save(tmp_path / "plain.gif")
    assert main(["info", str(tmp_path / "plain.gif"), str(tmp_path / "x.png")]) == 1
    shown = capsys.readouterr()
    assert "GIF image, 4x4\n  says nothing of how it was made" in shown.out
    assert "x.png', which is no picture, no sound and no video" in shown.err
    for path, words in ((tmp_path, "a folder or a device"), (tmp_path / "no", "No such file")):
        assert main(["info", str(path)]) == 1
        assert words in capsys.readouterr().err


def test_text_answers_say_their_seed(tmp_path: Path) -> None:
    words = StageResult(completions=(Completion(text="hi", token_ids=(1,), finish_reason="stop"),))
    drawn = OmniOutput(
        request_id="r", status=RequestStatus.FINISHED, results={"a": words}, metrics={"a": {"seed": 2**63 - 1}}
    )
    OutputFiles(f"{tmp_path}/x.json").write([drawn], ["p"])
    assert f'"seed": {2**63 - 1}' in (tmp_path / "x.json").read_text()


# Videos


def video(fps: float = 12.0) -> StageResult:
    return StageResult(videos=(Video(np.zeros((3, 4, 4, 3), np.uint8), fps),))


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny pipeline that makes videos."""
    folder = tmp_path_factory.mktemp("films")
    torch.manual_seed(0)
    save(ltx(), folder)
    return folder


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif", ".webp"])
def test_the_command_line_writes_a_video_that_says_how_it_was_made(
    suffix: str, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"x{suffix}"
    sizes = ["--num-frames", "9", "--fps", "12", "--height", "32", "--width", "32", "--steps", "2"]
    arguments = ["generate", "a cat", "--model", str(films), *sizes, "--seed", "5", "-q", "-o", str(path)]
    assert main(arguments) == 0, capsys.readouterr().err
    assert names(tmp_path) == [path.name]
    assert main(["info", str(path)]) == 0
    shown = capsys.readouterr().out
    for line in ("prompt: a cat", "seed: 5", "num_frames: 9", "fps: 12", "size: 32x32", "num_inference_steps: 2"):
        assert f"  {line}\n" in shown, shown


def test_a_picture_config_takes_no_length_and_no_rate_of_videos(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    no_work(monkeypatch)
    for flag, name in (("--num-frames", "num_frames"), ("--fps", "fps")):
        assert main(["generate", "a red circle", flag, "9", "-o", f"{tmp_path}/x.png"]) == 1
        assert f"{flag}: no stage of 'tiny-image' takes '{name}'" in capsys.readouterr().err
    assert main(["generate", "a red circle", "-o", f"{tmp_path}/x.mp4"]) == 1
    assert "but the config gives image" in capsys.readouterr().err


def test_videos_stand_beside_pictures_and_sounds(tmp_path: Path) -> None:
    made = output(sketch=pictures(), film=video())
    files = OutputFiles(f"{tmp_path}/")
    files.expect({"sketch": {"image"}, "film": {"video"}})
    assert [path.name for path in files.write([made])] == ["0.png", "0.mp4"]
    files = OutputFiles(f"{tmp_path}/a.webp")
    files.expect({"sketch": {"image"}, "film": {"video"}})
    assert [path.name for path in files.write([made])] == ["a.webp", "a.mp4"], "the picture's, where there is one"
    files = OutputFiles(f"{tmp_path}/b.webp")
    files.expect({"film": {"video"}})
    assert [path.name for path in files.write([output(film=video())])] == ["b.webp"]


def test_a_rate_that_a_gif_does_not_hold_comes_as_webp(tmp_path: Path) -> None:
    files = OutputFiles(f"{tmp_path}/x.gif")
    files.expect({"film": {"video"}})
    with pytest.raises(ConfigError, match="gif: got 60 frames a second"):
        files.write([output(film=video(60.0))])
    assert names(tmp_path) == ["x.webp"]
