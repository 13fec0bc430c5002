"""Every example runs from another folder than its own and writes what it says; some as a user starts them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from support.examples import EXAMPLES, PICTURE, picture, run, sound, start, succeed
from support.tiny_pipelines import save
from support.tiny_videos import ltx

from vllm_omni.media.video_files import VideoReader


def test_text_to_image_writes_a_picture_of_the_size_that_was_asked_for(tmp_path: Path) -> None:
    arguments = ("a large pink star", "--size", "96", "--steps", "2", "-o", "star.png")
    assert "96 x 96" in succeed("text_to_image.py", *arguments, folder=tmp_path)
    assert picture(tmp_path / "star.png").size == (96, 96)


def test_a_picture_starts_from_another(tmp_path: Path) -> None:
    shown = succeed("edit_image.py", "a blue circle", "--strength", "0.5", "-o", "edited.png", folder=tmp_path)
    assert "strength 0.5" in shown and picture(tmp_path / "edited.png").size == PICTURE
    succeed("edit_image.py", "a pink star", "--image", "edited.png", "-o", "again.png", folder=tmp_path)
    assert picture(tmp_path / "again.png").size == PICTURE


def test_what_a_mask_keeps_is_kept(tmp_path: Path) -> None:
    succeed("inpaint.py", "-o", "inpainted.png", folder=tmp_path)
    assert picture(tmp_path / "inpainted.png").size == PICTURE


def test_adapters_of_several_scales_draw_one_prompt_in_a_row(tmp_path: Path) -> None:
    shown = succeed("lora.py", "a large pink star", "-o", "row.png", folder=tmp_path)
    assert "scales 0, 0.5, 1" in shown
    row = picture(tmp_path / "row.png")
    assert row.size == (3 * PICTURE[0], PICTURE[1])
    parts = [row.crop((index * PICTURE[0], 0, (index + 1) * PICTURE[0], PICTURE[1])) for index in range(3)]
    assert len({part.tobytes() for part in parts}) == 3


def test_previews_stand_in_a_row_before_the_picture_and_progress_ends_at_all(tmp_path: Path) -> None:
    shown = succeed("stream_previews.py", "a large pink star", "--previews", "3", "-o", "row.png", folder=tmp_path)
    percent = [int(value) for value in re.findall(r"image +(\d+)%", shown)]
    assert percent == sorted(percent) and percent[-1] == 100 and shown.count("preview\n") == 3
    assert picture(tmp_path / "row.png").size == (4 * (PICTURE[0] + 4) - 4, PICTURE[1])


def test_a_picture_goes_on_later_to_what_it_would_have_been(tmp_path: Path) -> None:
    succeed("text_to_image.py", "a large pink star", "--steps", "6", "--seed", "0", "-o", "whole.png", folder=tmp_path)
    begun = succeed("resume.py", "a large pink star", "--steps", "6", "-o", "star.png", folder=tmp_path)
    assert "star.safetensors: stopped after 3 of 6 steps" in begun and not (tmp_path / "star.png").exists()
    assert "star.png: 3 of 6 steps were left" in succeed("resume.py", "-o", "star.png", folder=tmp_path)
    assert picture(tmp_path / "star.png").tobytes() == picture(tmp_path / "whole.png").tobytes()


def test_loose_words_are_shown_token_by_token_before_the_picture(tmp_path: Path) -> None:
    shown = succeed("loose_words_to_image.py", "-o", "out.png", folder=tmp_path)
    words = re.findall(r"writer  step \d+ of at most 48  (.*)", shown)
    (written,) = re.findall(r"wrote   (.*)", shown)
    assert len(words) > 1 and "".join(words).strip() == written
    assert shown.count("image   step ") == 9
    assert picture(tmp_path / "out.png").size == PICTURE


def test_hidden_states_are_written_and_synonyms_are_alike(tmp_path: Path) -> None:
    shown = succeed("hidden_states.py", "-o", "states.safetensors", folder=tmp_path)
    rows = [[float(value) for value in re.findall(r"[+-]\d\.\d\d", line)] for line in shown.split("\n")[:4]]
    assert rows[0][1] > max(rows[0][2:]) and rows[2][3] > max(rows[2][:2])
    with safe_open(str(tmp_path / "states.safetensors"), framework="pt") as file:
        assert len(list(file.keys())) == 8
        states = file.get_tensor("0.text.hidden_states")
        assert list(file.get_tensor("0.text.first_layers").shape) == [len(states), 2 * states.shape[1]]


def test_fan_out_gives_two_pictures_with_their_own_steps(tmp_path: Path) -> None:
    shown = succeed("fan_out.py", "--careful-steps", "6", "-o", "pictures", folder=tmp_path)
    assert re.findall(r"(\w+) +(\d+) steps", shown) == [("draft", "4"), ("careful", "6")]
    for stage in ("draft", "careful"):
        assert picture(tmp_path / "pictures" / f"{stage}.png").size == PICTURE


def test_a_custom_stage_puts_every_pixel_between_its_two_colours(tmp_path: Path) -> None:
    done = start("custom_stage.py", "-o", "print.png", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    image = picture(tmp_path / "print.png")
    assert image.size == PICTURE
    dark, light = (60, 0, 90), (255, 240, 200)
    for _, (red, green, blue) in image.convert("RGB").getcolors(image.width * image.height):
        share = green / (light[1] - dark[1])
        expected = (dark[channel] + share * (light[channel] - dark[channel]) for channel in range(3))
        assert all(abs(got - value) <= 1.5 for got, value in zip((red, green, blue), expected, strict=True))


def test_a_custom_stage_refuses_what_its_parameters_do_not_allow(tmp_path: Path) -> None:
    done = start("custom_stage.py", "--strength", "2", folder=tmp_path)
    assert done.returncode != 0 and "strength: got 2.0, expected 0 to 1" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_demo_shows_what_was_asked_written_and_run_and_writes_pictures_and_sounds(tmp_path: Path) -> None:
    shown = succeed("demo.py", "-o", "demo", folder=tmp_path)
    assert shown.count("asked  ") == shown.count("wrote  ") == 3
    assert max(map(len, shown.split("\n")[:-2])) <= 100
    for stage, count in (("thinker", 3), ("image", 2), ("sound", 2)):
        assert len(re.findall(rf"^   {stage} +[░█ ]*█", shown, flags=re.MULTILINE)) == count
    folder = tmp_path / "demo"
    assert shown.rstrip().endswith(str(folder.resolve()))
    made = {"1.png", "2.png", "2.wav", "2-sound.png", "3.wav", "3-sound.png", "sheet.png", "timeline.png"}
    assert {path.name for path in folder.iterdir()} == made
    assert all(picture(folder / f"{n}.png").size == PICTURE for n in (1, 2))
    assert all(sound(folder / f"{n}.wav") == (32000, 16000) for n in (2, 3))
    sheet = picture(folder / "sheet.png")
    assert sheet.width > 3 * 256 and sheet.height > 256
    assert picture(folder / "timeline.png").width == 900


def test_text_to_audio_writes_the_sound_and_its_spectrogram(tmp_path: Path) -> None:
    shown = succeed("text_to_audio.py", "C4 then E4, square", "-o", "melody.flac", folder=tmp_path)
    assert "melody.flac: 2 s at 16000 Hz" in shown
    assert sound(tmp_path / "melody.flac") == (32000, 16000)
    assert picture(tmp_path / "melody.png").width > 300


def test_a_video_of_a_folder_is_written_with_every_step_told(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save(ltx(), tmp_path / "model")
    sizes = ("--height", "32", "--width", "32", "--num-frames", "9", "--steps", "2", "--fps", "12")
    shown = succeed("video.py", "a cat", "--model", "model", *sizes, "-o", "cat.mp4", folder=tmp_path)
    assert "result: step 2 of 2" in shown and "cat.mp4: Video(0.75 s, 9 frames of 32x32, 12 fps)" in shown
    with (tmp_path / "cat.mp4").open("rb") as file, VideoReader(file, "cat.mp4") as reader:
        assert (reader.header.num_frames, reader.header.fps) == (9, 12.0)
    assert picture(tmp_path / "cat.png").size == (32, 32)


def test_one_prompt_gives_a_picture_and_a_sound_and_skips_what_is_not_asked_for(tmp_path: Path) -> None:
    prompts = ("show me a scarlet ball and play a C4 on a string", "paint a navy box")
    shown = succeed("picture_and_sound.py", *prompts, "-o", "out", folder=tmp_path)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"0.png", "0.wav", "1.png"}
    assert picture(tmp_path / "out" / "1.png").size == PICTURE and sound(tmp_path / "out" / "0.wav") == (32000, 16000)
    assert re.findall(r"^skipped (.*)", shown, flags=re.MULTILINE)[0] == "nothing"
    assert "sound_prompt" in re.findall(r"^skipped (.*)", shown, flags=re.MULTILINE)[1]


@pytest.mark.parametrize("name", ["speech_chat.py", "stream_speech.py"])
def test_an_example_of_speech_without_a_checkpoint_says_how_to_get_and_name_one(name: str, tmp_path: Path) -> None:
    done = run(name, folder=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "needs the folder of a Qwen2.5-Omni checkpoint" in done.stderr
    assert f"python examples/{name} --model " in done.stderr
    assert not list(tmp_path.iterdir())


def test_tiny_speech_reads_out_what_it_is_asked_to(tmp_path: Path) -> None:
    shown = succeed("tiny_speech.py", "say stop", "-o", "reply.wav", folder=tmp_path)
    samples, rate = sound(tmp_path / "reply.wav")
    assert rate == 24_000 and "wrote   stop" in shown and f"{samples / rate:.2f} s" in shown


def test_tiny_talker_says_its_words(tmp_path: Path) -> None:
    shown = succeed("tiny_talker.py", "3 7 red", "-o", "speech.wav", folder=tmp_path)
    samples, rate = sound(tmp_path / "speech.wav")
    assert rate == 24_000 and f"{samples / rate:.2f} s at 24000 Hz" in shown and "the first sound after" in shown


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_every_example_has_a_test_and_says_how_it_is_run(path: Path) -> None:
    tests = [Path(__file__), *(Path(__file__).parents[1] / "models").rglob("test_*_pipeline.py")]
    assert any(f'"{path.name}"' in test.read_text(encoding="utf-8") for test in tests)
    assert f"python examples/{path.name}" in path.read_text(encoding="utf-8").split('"""')[1]
