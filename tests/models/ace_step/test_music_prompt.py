"""The stage kind `music_prompt`: texts equal to diffusers', every request key checked, sounds brought to the model's
rate, and whatever does not fit refused before anything runs.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AceStepPipeline
from diffusers.pipelines.ace_step.pipeline_ace_step import TASK_INSTRUCTIONS
from support.music import HOP, POOL, RATE, codes, save_folder, sound
from support.toy_engine import register_toys

from vllm_omni import DiffusionParams, Omni, OmniRequest
from vllm_omni.config.schema import LimitsConfig, OmniConfig, StageConfig
from vllm_omni.engine.base import Activity, EngineContext, ReadPorts
from vllm_omni.errors import CheckpointError, ConfigError, InvalidRequestError, StageError
from vllm_omni.messages import StageDone, StageEvent, StageFailed, StageTask
from vllm_omni.models.ace_step import prompt_stage
from vllm_omni.models.ace_step.prompt_options import REQUEST_KEYS, MusicPromptOptions
from vllm_omni.models.ace_step.prompt_spec import MusicPromptSpec
from vllm_omni.models.ace_step.request import MusicOutline, MusicRequest
from vllm_omni.models.ace_step.request_reader import MusicRequestReader
from vllm_omni.payload import DataSpec, TensorSpec, TextSpec
from vllm_omni.utils.files import ModelFolders
from vllm_omni.worker.background import Background
from vllm_omni.worker.model_pool import ModelPool

TEXTS = frozenset({"caption", "lyrics", "plain_caption", "audio_codes", "music"})
EVERYTHING = TEXTS | {"source_audio", "reference_audio"}


class Prompter:
    """One stage, and who reads it."""

    def __init__(
        self,
        folder: Path,
        reads: frozenset[str] = EVERYTHING,
        limits: LimitsConfig | None = None,
        inputs: dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        config = OmniConfig(limits=limits or LimitsConfig())
        stage = StageConfig("prompt", "music_prompt", str(folder), inputs or {}, options=MusicPromptOptions(**options))
        self.spec, self.reads, self.woken = MusicPromptSpec(stage, config, ModelFolders()), ReadPorts(reads), Event()
        cpu, background = torch.device("cpu"), Background(self.woken.set)
        self.engine = self.spec.load(
            EngineContext(cpu, torch.float32, ModelPool(), background, self.reads, config.limits)
        )

    def check(
        self, params: DiffusionParams | None = None, *, prompt: Any = "calm piano", **fields: Any
    ) -> MusicRequest:
        return self.task(params, prompt=prompt, **fields).prepared  # type: ignore[no-any-return]

    def task(self, params: DiffusionParams | None = None, *, prompt: Any = "calm piano", **fields: Any) -> StageTask:
        request, params = OmniRequest(prompt=prompt, fields=fields), params or DiffusionParams()
        return StageTask(request, "prompt", params, prepared=self.spec.check(request, params, self.reads))

    def events(self, count: int) -> list[StageEvent]:
        """Steps until so many have come, waiting for what is decoded in the background."""
        found = self.engine.step()
        while len(found) < count:
            if self.engine.activity() is Activity.PENDING:
                assert self.woken.wait(30)
                self.woken.clear()
            found += self.engine.step()
        return found

    def payload(self, params: DiffusionParams | None = None, **fields: Any) -> Any:
        self.engine.submit(self.task(params, **fields))
        (event,) = self.events(1)
        assert isinstance(event, StageDone) and self.engine.activity() is Activity.IDLE
        return event.payload

    def music(self, params: DiffusionParams | None = None, **fields: Any) -> Any:
        return self.payload(params, **fields).meta["music"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_folder(tmp_path / "model")


@pytest.fixture
def prompter(folder: Path) -> Prompter:
    return Prompter(folder)


# Texts


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"lyrics": "[verse]\nla {la}\n", "vocal_language": "ja"},
        {"bpm": 120, "keyscale": "F# minor", "timesignature": "3", "duration_s": 12.9},
        {"bpm": 30, "duration_s": 0.4},
        {"keyscale": "B♭ major", "timesignature": "6"},
        {"instruction": "Sing it"},
        {"instruction": "Sing it:", "duration_s": 599},
    ],
)
def test_texts_are_those_of_diffusers(prompter: Prompter, fields: dict[str, Any]) -> None:
    facts = {key: value for key, value in fields.items() if key != "duration_s"}
    formatted = AceStepPipeline._format_prompt(
        AceStepPipeline, "calm piano", audio_duration=fields.get("duration_s", 60.0), **facts
    )
    meta = prompter.payload(**fields).meta
    assert (meta["caption"], meta["lyrics"]) == formatted
    facts.pop("instruction", None)
    plain = AceStepPipeline._format_prompt(
        AceStepPipeline, "calm piano", audio_duration=fields.get("duration_s", 60.0), **facts
    )
    assert (meta["plain_caption"], meta["lyrics"]) == plain


@pytest.mark.parametrize(
    ("fields", "task"),
    [
        ({}, "text2music"),
        ({"task_type": "cover", "audio": sound()}, "cover"),
        ({"task_type": "repaint", "audio": sound()}, "repaint"),
        ({"audio_codes": codes(3)}, "cover"),
    ],
)
def test_the_instruction_is_the_tasks_own(prompter: Prompter, fields: dict[str, Any], task: str) -> None:
    meta = prompter.payload(**fields).meta
    assert f"# Instruction\n{TASK_INSTRUCTIONS[task]}\n" in meta["caption"]
    assert f"# Instruction\n{TASK_INSTRUCTIONS['text2music']}\n" in meta["plain_caption"]
    assert meta["music"]["task_type"] == task


def test_the_planner_reads_a_chat_with_the_known_facts_as_its_thoughts(folder: Path) -> None:
    prompter = Prompter(folder, TEXTS | {"planner_prompt"})
    payload = prompter.payload(lyrics="la la", bpm=90, keyscale="c major", timesignature=4, duration_s=15.5)
    assert payload.meta["planner_prompt"] == (
        "<|im_start|>system\n# Instruction\nGenerate audio semantic tokens based on the given conditions:\n\n"
        "<|im_end|>\n"
        "<|im_start|>user\n# Caption\ncalm piano\n\n# Lyric\nla la\n<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nbpm: 90\nduration: 15\nkeyscale: C major\ntimesignature: 4\n</think>\n\n"
        "<|im_end|>\n"
    )
    assert "<think>\nduration: 60\n</think>" in prompter.payload().meta["planner_prompt"]


def test_where_a_planner_writes_codes_the_music_is_a_cover_of_them(folder: Path) -> None:
    music = Prompter(folder, TEXTS | {"planner_prompt"}).music()
    assert (music["task_type"], music["has_audio_codes"]) == ("cover", True)
    for task in ("cover", "repaint"):
        with pytest.raises(InvalidRequestError, match="a language model plans the sounds of this config"):
            Prompter(folder, EVERYTHING | {"planner_prompt"}).check(task_type=task, audio=sound())


# The music value and the sounds


def test_music_says_what_is_asked(prompter: Prompter) -> None:
    assert prompter.music() == {
        "task_type": "text2music",
        "duration_s": 60.0,
        "num_frames": 60 * RATE // HOP,
        "repaint_frames": None,
        "cover_strength": 1.0,
        "has_source_audio": False,
        "has_reference_audio": False,
        "has_audio_codes": False,
    }
    repaint = prompter.music(task_type="repaint", audio=sound(), repainting_start=0.5, repainting_end=1)
    assert (repaint["repaint_frames"], repaint["has_source_audio"]) == ([12, 25], True)
    assert prompter.music(task_type="repaint", audio=sound())["repaint_frames"] == [0, None]
    cover = prompter.music(task_type="cover", audio=sound(), audio_cover_strength=0.25, reference_audio=sound(0.3))
    assert (cover["cover_strength"], cover["has_reference_audio"]) == (0.25, True)
    for value in (repaint, cover):
        assert json.loads(json.dumps(value)) == value == MusicOutline.from_json(value).to_json()
    assert prompter.payload(audio_codes=codes(2)).meta["audio_codes"] == codes(2)
    assert prompter.payload().meta["audio_codes"] == ""


def test_sounds_come_at_the_models_rate_and_channels(prompter: Prompter) -> None:
    mono = sound(rate=8000, channels=1)
    tensors = prompter.payload(task_type="cover", audio=sound(), reference_audio=mono).tensors
    assert np.array_equal(tensors["source_audio"].numpy(), sound().samples)
    assert tensors["reference_audio"].dtype == torch.float32 and tensors["reference_audio"].shape == (2, 2 * RATE)
    assert np.abs(tensors["reference_audio"].numpy() - sound(channels=1).samples)[:, 500:-500].max() < 1e-3
    assert not prompter.payload().tensors


def test_a_sound_may_be_a_file_and_one_that_goes_bad_fails_its_request_alone(
    prompter: Prompter, tmp_path: Path
) -> None:
    path = tmp_path / "song.flac"
    sound(1.0).save(path)
    good = prompter.task(task_type="cover", audio=str(path))
    bad = prompter.task(task_type="cover", audio=sound(), reference_audio=path)
    samples = sound().samples.copy()
    samples[0, 5] = np.nan
    worse = prompter.task(task_type="cover", audio=(samples, RATE))
    prompter.engine.submit(good)
    (done,) = prompter.events(1)
    assert isinstance(done, StageDone) and done.payload.tensors["source_audio"].shape == (2, RATE)
    path.write_bytes(b"gone")
    tasks = (bad, prompter.task(), worse)
    for task in tasks:
        prompter.engine.submit(task)
    found = {event.request_id: event for event in prompter.events(3)}
    first, plain, second = (found[task.request_id] for task in tasks)
    assert isinstance(first, StageFailed) and "reference_audio: got a file that is no sound" in str(first.error)
    assert isinstance(second, StageFailed) and "audio: got samples that are NaN" in str(second.error)
    assert isinstance(plain, StageDone) and prompter.engine.activity() is Activity.IDLE


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Event]:
    """Decoding stands still until it is set."""
    gate, read_audio = Event(), prompt_stage.read_audio

    def held(*args: Any, **kwargs: Any) -> Any:
        assert gate.wait(30)
        return read_audio(*args, **kwargs)

    monkeypatch.setattr(prompt_stage, "read_audio", held)
    yield gate
    gate.set()


def test_while_audio_is_decoded_other_requests_are_answered_and_submit_decodes_nothing(
    prompter: Prompter, gate: Event
) -> None:
    slow, quick = prompter.task(task_type="cover", audio=sound()), [prompter.task(), prompter.task()]
    assert prompter.engine.activity() is Activity.IDLE
    prompter.engine.submit(slow)
    assert prompter.engine.activity() is Activity.PENDING and prompter.engine.step() == []
    for task in quick:
        prompter.engine.submit(task)
    assert prompter.engine.activity() is Activity.BUSY
    for task in quick:
        (event,) = prompter.engine.step()
        assert isinstance(event, StageDone) and event.request_id == task.request_id
    assert prompter.engine.activity() is Activity.PENDING and prompter.engine.get_stats() == {"queued": 1}
    gate.set()
    (event,) = prompter.events(1)
    assert isinstance(event, StageDone) and event.request_id == slow.request_id
    assert event.payload.tensors["source_audio"].shape == (2, 2 * RATE)


def test_abort_while_audio_is_decoded_leaves_nothing_and_what_waits_is_never_decoded(
    prompter: Prompter, gate: Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[object] = []
    decode = prompt_stage.decode
    monkeypatch.setattr(prompt_stage, "decode", lambda asked, *rest: (begun.append(asked), decode(asked, *rest))[1])
    tasks = [prompter.task(task_type="cover", audio=sound(), reference_audio=sound()) for _ in range(5)]
    for task in tasks:
        prompter.engine.submit(task)
    for task in tasks[:4]:
        prompter.engine.abort(task.request_id)
    assert prompter.engine.get_stats() == {"queued": 1}
    gate.set()
    (event,) = prompter.events(1)
    assert event.request_id == tasks[4].request_id
    assert not any(asked is task.prepared for asked in begun for task in tasks[2:4])
    assert prompter.engine.activity() is Activity.IDLE and prompter.engine.step() == []


def test_a_defect_in_decoding_fails_its_request_alone_and_names_the_stage(
    prompter: Prompter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_stage, "read_audio", lambda *_, **__: 1 / 0)
    tasks = [prompter.task(task_type="cover", audio=sound()), prompter.task()]
    for task in tasks:
        prompter.engine.submit(task)
    found = {event.request_id: event for event in prompter.events(2)}
    failed = found[tasks[0].request_id]
    assert isinstance(failed, StageFailed) and isinstance(failed.error, StageError)
    assert "stage 'prompt' failed: ZeroDivisionError" in str(failed.error)
    assert isinstance(found[tasks[1].request_id], StageDone)


def test_abort_drops_a_request_and_unknown_ids_are_fine(prompter: Prompter) -> None:
    task = prompter.task()
    prompter.engine.submit(task)
    prompter.engine.abort(task.request_id)
    prompter.engine.abort("unknown")
    assert prompter.engine.activity() is Activity.IDLE and prompter.engine.step() == []


def test_a_request_is_read_once_and_an_edge_brings_its_words_later(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompter = Prompter(folder, inputs={"prompt": "writer.text"}, limits=LimitsConfig(max_prompt_chars=500))
    assert prompter.spec.signature.required_inputs == {"prompt"}
    tasks = [prompter.task(prompt=[1, 2], lyrics="la", duration_s=2) for _ in range(2)]  # its own prompt is not read
    monkeypatch.setattr(MusicRequestReader, "read", lambda *_: pytest.fail("read again"))
    for task, words in zip(tasks, ("soft bells", "x" * 501), strict=True):
        prompter.engine.submit(dataclasses.replace(task, inputs={"prompt": words}))
    done, failed = prompter.events(2)
    assert isinstance(done, StageDone) and "# Caption\nsoft bells\n" in done.payload.meta["caption"]
    assert isinstance(failed, StageFailed) and "prompt: got 501 characters" in str(failed.error)


# Duration


@pytest.mark.parametrize(
    ("params", "fields", "expected"),
    [
        (None, {}, 7.0),
        (None, {"duration_s": 3}, 3.0),
        (3.5, {}, 3.5),
        (3.5, {"duration_s": 3.5}, 3.5),
        (None, {"task_type": "cover", "audio": sound(2.5)}, 2.5),
        (2.5, {"task_type": "cover", "audio": sound(2.5)}, 2.5),
        (None, {"audio_codes": codes(10)}, 10 * POOL * HOP / RATE),
        (None, {"audio_codes": codes(10), "duration_s": 1.5}, 1.5),  # within one code
        (None, {"reference_audio": sound(2.5)}, 7.0),
    ],
)
def test_the_duration_is_as_given_else_that_of_the_source_else_the_default(
    folder: Path, params: float | None, fields: dict[str, Any], expected: float
) -> None:
    prompter = Prompter(folder, default_duration_s=7.0)
    assert prompter.music(DiffusionParams(duration_s=params), **fields)["duration_s"] == expected


def test_codes_are_five_frames_each_where_the_folder_does_not_say(tmp_path: Path) -> None:
    prompter = Prompter(save_folder(tmp_path, pool=None))
    assert prompter.music(audio_codes=codes(10))["duration_s"] == 10 * 5 * HOP / RATE


# Refusals


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": [1, 2]}, "prompt: got tokens or messages, expected a string"),
        ({"lyrics": 7}, "lyrics: got int, expected a string"),
        ({"lyrics": "x" * 501}, r"lyrics: got 501 characters, expected at most 500 \(limits.max_prompt_chars\)"),
        ({"prompt": "x" * 501}, "prompt: got 501 characters"),
        ({"instruction": ""}, "instruction: got '', expected words"),
        ({"instruction": ["x"]}, "instruction: got list"),
        ({"bpm": 29}, r"bpm: got 29, expected at least 30 and at most 300 \(beats per minute\)"),
        ({"bpm": 301}, "bpm: got 301"),
        ({"bpm": 99.5}, "bpm: got 99.5, expected an integer"),
        ({"bpm": "120"}, "bpm: got '120', expected an integer"),
        ({"keyscale": "H major"}, "keyscale: got 'H major', expected a note A to G"),
        ({"keyscale": "C"}, "keyscale: got 'C'"),
        ({"keyscale": 3}, "keyscale: got 3"),
        ({"timesignature": 5}, "timesignature: got 5, expected '2', '3', '4' or '6', the beats of a bar"),
        ({"timesignature": "4/4"}, "timesignature: got '4/4'"),
        ({"timesignature": True}, "timesignature: got True"),
        ({"timesignature": 10**5000}, "timesignature: got a int too long"),
        ({"vocal_language": "xx"}, "vocal_language: got 'xx', expected one of ar, az"),
        ({"vocal_language": ","}, "vocal_language: got ','"),
        ({"task_type": "lego"}, "task_type: got 'lego', which is not supported; expected 'text2music', 'cover' or"),
        ({"task_type": "covr"}, r"task_type: got 'covr', .*\(did you mean 'cover'\?\)"),
        ({"task_type": ["cover"]}, r"task_type: got \['cover'\]"),
        ({"duration_s": 0}, r"duration_s: got 0, expected more than 0 \(seconds\)"),
        ({"duration_s": -1}, "duration_s: got -1"),
        ({"duration_s": float("nan")}, "duration_s: got nan"),
        ({"duration_s": "10"}, "duration_s: got '10', expected a finite number"),
        ({"duration_s": 90.5}, r"duration_s: got 90.5, expected at most 90 \(limits.max_duration_s\)"),
        ({"task_type": "repaint"}, "'repaint' needs the sound to be changed; give it as 'audio'"),
        ({"task_type": "cover"}, "'cover' needs 'audio' or 'audio_codes'"),
        ({"audio": sound()}, "audio: task_type 'text2music' reads none"),
        ({"task_type": "cover", "audio": sound(), "audio_codes": codes(1)}, "audio_codes: got them beside audio"),
        ({"task_type": "cover", "audio": "nowhere.wav"}, "audio: got 'nowhere.wav', which cannot be read"),
        ({"reference_audio": b"x"}, "reference_audio: got a file that is no sound"),
        ({"reference_audio": sound(channels=3)}, "reference_audio: got 3 channels, expected 1 or 2"),
        ({"task_type": "cover", "audio": sound(0.03)}, "audio: got 0.030000 s, expected at least 0.040000 s, one"),
        ({"task_type": "cover", "audio": sound(), "duration_s": 3}, "got 3, but the source lasts 2.00 s"),
        ({"audio_codes": codes(10), "duration_s": 2}, "got 2, but the codes last 1.60 s"),
        ({"audio_codes": "<|audio_code_1|> la"}, "audio_codes: got '<|audio_code_1|> la', expected codes alone"),
        ({"audio_codes": ""}, "audio_codes: got '', expected codes alone"),
        ({"audio_codes": "<|audio_code_99999999999|>"}, "expected codes alone"),
        ({"repainting_start": 1}, "repainting_start: read by task_type 'repaint' alone, got 'text2music'"),
        ({"audio_cover_strength": 0.5}, "audio_cover_strength: read by covers alone, got task_type 'text2music'"),
        ({"audio_codes": codes(3), "audio_cover_strength": 1.5}, "audio_cover_strength: got 1.5, expected at least 0"),
    ],
    ids=lambda value: str(value)[:40].encode("ascii", "replace").decode() if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused(folder: Path, fields: dict[str, Any], words: str) -> None:
    prompter = Prompter(folder, limits=LimitsConfig(max_prompt_chars=500, max_duration_s=90))
    with pytest.raises(InvalidRequestError, match=words.replace("|", r"\|")):
        prompter.check(**fields)


@pytest.mark.parametrize(
    ("start", "end", "words"),
    [
        (1.5, 1.0, "repainting_start: got 1.5, expected less than repainting_end, 1"),
        (None, 0, "repainting_start: got 0, expected less than repainting_end, 0"),
        (2.0, None, "repainting_start: got 2, expected less than the end of the sound, 2"),
        (0, 2.5, "repainting_end: got 2.5, expected at least 0 and at most 2.04, the length of the sound"),
        (-1, None, "repainting_start: got -1"),
        ("0", None, "repainting_start: got '0', expected a finite number"),
    ],
)
def test_a_window_lies_within_the_sound(prompter: Prompter, start: Any, end: Any, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        prompter.check(task_type="repaint", audio=sound(), repainting_start=start, repainting_end=end)


def test_the_duration_is_given_once(prompter: Prompter) -> None:
    with pytest.raises(InvalidRequestError, match="got 3 in the prompt and 4 in the parameters; give one"):
        prompter.check(DiffusionParams(duration_s=4), duration_s=3)


def test_a_stage_may_allow_less_than_the_limits(folder: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"got 3, expected at most 2 \(the stage's max_duration_s\)"):
        Prompter(folder, default_duration_s=1.0, max_duration_s=2.0).check(duration_s=3)


@pytest.mark.parametrize(
    ("port", "fields"),
    [
        ("source_audio", {"task_type": "cover", "audio": sound()}),
        ("reference_audio", {"reference_audio": sound()}),
        ("audio_codes", {"audio_codes": codes(1)}),
    ],
)
def test_a_sound_that_no_stage_reads_is_refused(folder: Path, port: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=rf"no stage of this config reads it \(the port '{port}'\)"):
        Prompter(folder, EVERYTHING - {port}).check(**fields)


@pytest.mark.parametrize(
    ("given", "expected"),
    [("c MAJOR", "C major"), (" F#  Minor ", "F# minor"), ("bb minor", "Bb minor"), ("E♭ major", "E♭ major")],
)
def test_keys_are_written_as_the_model_knows_them(prompter: Prompter, given: str, expected: str) -> None:
    assert f"- keyscale: {expected}\n" in prompter.payload(keyscale=given).meta["caption"]


# The stage in a graph


def test_the_ports_are_known_from_the_folder(folder: Path) -> None:
    signature = Prompter(folder).spec.signature
    texts = ("caption", "lyrics", "plain_caption", "planner_prompt", "audio_codes")
    assert {signature.outputs[port] for port in texts} == {TextSpec()}
    assert signature.outputs["music"] == DataSpec("music")
    assert signature.outputs["source_audio"] == signature.outputs["reference_audio"] == TensorSpec((2, "n"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"default_duration_s": 0}, "default_duration_s: got 0, expected more than 0"),
        ({"max_duration_s": 2.0}, r"default_duration_s: got 60, expected at most max_duration_s \(2\)"),
        ({"min_duration_s": 90.0}, r"default_duration_s: got 60, expected at least min_duration_s \(90\)"),
        ({"fields": ["lyrics", "tempo"]}, r"fields: got 'tempo' \(known: "),
        ({"fields": ["lyric"]}, r"fields: got 'lyric' \(did you mean 'lyrics'\?\)"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        MusicPromptOptions(**options)


def graph(folder: Path, **section: Any) -> dict[str, Any]:
    register_toys()
    prompt = {"kind": "music_prompt", "model": str(folder), **section}
    reader = {"kind": "toy_text", "inputs": {"words": "prompt.caption"}, "defaults": {"steps": 1}}
    return {"stages": {"prompt": prompt, "reader": reader}, "outputs": ["reader"]}


def test_the_words_may_be_another_stages(folder: Path) -> None:
    config = graph(folder, inputs={"prompt": "writer.text"}, default_duration_s=2.0)
    config["stages"]["writer"] = {"kind": "toy_text", "defaults": {"steps": 2}}
    with Omni(config) as omni:
        (output,) = omni.generate("la ")
    assert "# Caption\nla la \n" in str(output.text)


def test_a_branch_that_is_not_taken_makes_no_music(folder: Path) -> None:
    config = graph(folder, inputs={"prompt": {"from": "writer.text", "when": "text == 'yes'"}})
    config["stages"]["writer"] = {"kind": "toy_text", "defaults": {"steps": 1}}
    with Omni(config) as omni:
        yes, no = omni.generate(["yes", "no"])
    assert "# Caption\nyes\n" in str(yes.text)
    assert no.error is None and no.text == "no" and no.metrics["prompt"]["skipped"]  # the reader has words of its own


def test_parameters_for_the_stage_by_name_are_those_that_it_reads(folder: Path) -> None:
    with Omni(graph(folder)) as omni:
        good, bad = omni.generate(
            ["a", "a"], [{"prompt": DiffusionParams(duration_s=3)}, {"prompt": DiffusionParams(seed=3)}]
        )
    assert "- duration: 3 seconds" in str(good.text)
    assert "params['prompt'].seed: this stage reads duration_s alone" in str(bad.error)


def spec_of(folder: Path | None, **section: Any) -> MusicPromptSpec:
    stage = StageConfig("prompt", "music_prompt", None if folder is None else str(folder), **section)
    return MusicPromptSpec(stage, OmniConfig(), ModelFolders())


def test_wrong_folders_and_defaults_are_named(tmp_path: Path) -> None:
    folder = save_folder(tmp_path)
    with pytest.raises(
        ConfigError, match=r"defaults: got duration_s, but this stage takes none; set default_duration_s"
    ):
        spec_of(folder, defaults={"duration_s": 3.0})
    (folder / "vae" / "config.json").write_text(json.dumps({"sampling_rate": RATE, "audio_channels": 2}))
    with pytest.raises(ConfigError, match="downsampling_ratios: got None, expected a list"):
        spec_of(folder)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "ZImagePipeline"}))
    with pytest.raises(ConfigError, match="got a folder of 'ZImagePipeline', expected one of 'AceStepPipeline'"):
        spec_of(folder)
    (folder / "model_index.json").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        spec_of(folder)
    with pytest.raises(ConfigError, match="model: missing; expected the folder of an AceStepPipeline"):
        spec_of(None)


def test_a_graph_takes_the_request_keys_of_its_model_alone(folder: Path) -> None:
    with Omni(graph(folder, fields=["lyrics", "duration_s"], default_duration_s=2.0)) as omni:
        good, unknown, typo, planned = omni.generate(
            [{"prompt": "a", "duration_s": 3}, {"prompt": "a", "bpm": 90}, {"prompt": "a", "durations": 3}, "a"]
        )
        assert good.error is None and "- duration: 3 seconds" in str(good.text)
        assert "- duration: 2 seconds" in str(planned.text)
        assert "prompt['bpm']: unknown key (known:" in str(unknown.error)
        assert "prompt['durations']: unknown key (did you mean 'duration_s'?)" in str(typo.error)
    assert Prompter(folder).spec.request_keys == REQUEST_KEYS
    assert Prompter(folder, fields=["lyrics"]).spec.request_keys == {"lyrics"}
