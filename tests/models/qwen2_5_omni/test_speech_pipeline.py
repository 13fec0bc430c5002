"""The whole Qwen2.5-Omni graph against transformers' `generate`: words, codes, waveform; streams, preemption, ends."""

from __future__ import annotations

import shutil
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from support.speech import CODEC_EOS, save_tiny_omni, tiny_reference
from support.speech_engines import padded

from vllm_omni import DiffusionParams, Omni, OmniOutput, SamplingParams
from vllm_omni.errors import InvalidRequestError, OmniError
from vllm_omni.models.qwen2_5_omni.token2wav.trajectory import frame_noise

PROMPTS = ([1, 2, 3, 4, 5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 2, 1, 20, 21, 22], [40, 41, 42])
NUM_WORDS, NUM_CODES, NUM_POINTS, MEL = 12, 60, 4, 20
OUTPUTS = "outputs=[thinker, token2wav, talker.codes]"
WHOLE = (
    "talker.inputs={prompt_states: thinker.prompt_states, prompt_positions: thinker.prompt_positions, "
    "reply_states: thinker.reply_states}",
    "token2wav.inputs={codes: talker.codes}",
)
FAR_STREAM = "{first_chunk: 4, chunk: 12, left_context: 60, look_ahead: 60}"
FAR = f"token2wav.inputs={{codes: {{from: talker.codes, stream: {FAR_STREAM}}}}}"


@dataclass(frozen=True)
class Spoken:
    words: list[int]
    codes: list[int]
    wave: torch.Tensor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_omni(tmp_path_factory.mktemp("omni"))


@pytest.fixture(scope="module")
def references(folder: Path) -> list[Spoken]:
    return [reference(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def omni(folder: Path) -> Iterator[Omni]:
    with make(folder, *WHOLE) as engine:
        yield engine


def reference(prompt: list[int]) -> Spoken:
    """transformers' answer, greedy, from the noise that a seed of 0 means here."""
    model, codes = tiny_reference(), list[list[int]]()
    model.token2wav.register_forward_pre_hook(lambda module, given: codes.extend(given[0].tolist()))
    noise = frame_noise(0, 0, 2 * NUM_CODES, MEL)[None]
    with mock.patch("torch.randn", lambda shape, **rest: noise[:, : shape[1]]):
        written, wave = model.generate(
            **padded(prompt),
            thinker_max_new_tokens=NUM_WORDS,
            thinker_do_sample=False,
            talker_max_new_tokens=NUM_CODES,
            talker_do_sample=False,
            talker_eos_token_id=list(CODEC_EOS),
            token2wav_num_steps=NUM_POINTS,
        )
    return Spoken(written[0, len(prompt) + 1 :].tolist(), codes[0], wave)


def make(folder: Path, *overrides: str) -> Omni:
    given = [OUTPUTS, *overrides]
    return Omni("qwen_omni", model=str(folder), overrides=given, device="cpu", dtype="float32", progress=False)


def params() -> dict[str, Any]:
    return {
        "thinker": SamplingParams(temperature=0.0, max_tokens=NUM_WORDS),
        "talker": SamplingParams(temperature=0.0, max_tokens=NUM_CODES),
        "token2wav": DiffusionParams(seed=0, num_inference_steps=NUM_POINTS),
    }


def speak(omni: Omni, *prompts: list[int]) -> list[OmniOutput]:
    outputs = omni.generate([{"prompt_token_ids": prompt} for prompt in prompts], params())
    for output in outputs:
        assert output.error is None, output.error
    return outputs


def codes_of(output: OmniOutput) -> list[int]:
    return output.tensors["talker.codes"].tolist()


def wave_of(output: OmniOutput) -> torch.Tensor:
    return torch.from_numpy(output.audios[0].samples[0].copy())


def relative_error(wave: torch.Tensor, expected: torch.Tensor) -> float:
    assert wave.shape == expected.shape
    return float((wave - expected).norm() / expected.norm())


def test_words_codes_and_waveform_equal_the_reference_in_one_batch(omni: Omni, references: list[Spoken]) -> None:
    for output, expected in zip(speak(omni, *PROMPTS), references, strict=True):
        assert list(output.token_ids) == expected.words
        assert codes_of(output) == expected.codes
        assert relative_error(wave_of(output), expected.wave) < 1e-3


def test_alone_as_in_the_crowd(omni: Omni, references: list[Spoken]) -> None:
    for prompt, expected in zip(PROMPTS, references, strict=True):
        (output,) = speak(omni, prompt)
        assert codes_of(output) == expected.codes
        assert relative_error(wave_of(output), expected.wave) < 1e-3


@pytest.mark.parametrize("edges", [(), WHOLE], ids=["streamed", "whole"])
def test_speech_of_nothing_harms_no_mate_and_has_no_codes(
    folder: Path, references: list[Spoken], edges: tuple[str, ...]
) -> None:
    short = {**params(), "thinker": SamplingParams(temperature=0.0, max_tokens=1)}
    mute = {**params(), "talker": SamplingParams(temperature=0.0, stop_token_ids=list(range(60)))}
    prompts = [{"prompt_token_ids": prompt} for prompt in (PROMPTS[0], PROMPTS[0], PROMPTS[1])]
    with make(folder, *edges) as omni:
        *silent, spoken = omni.generate(prompts, [short, mute, params()])
        for output, num_words in zip(silent, (1, NUM_WORDS), strict=True):
            assert output.error is None and list(output.token_ids) == references[0].words[:num_words]
            assert codes_of(output) == [] and output.audios[0].samples.shape == (1, 0)
        assert codes_of(spoken) == references[1].codes
        omni._executor.check_integrity()


def test_streamed_with_enough_context_equals_whole(folder: Path, references: list[Spoken]) -> None:
    with make(folder, FAR) as omni:
        for output, expected in zip(speak(omni, *PROMPTS), references, strict=True):
            assert codes_of(output) == expected.codes
            assert relative_error(wave_of(output), expected.wave) < 1e-3


def test_streamed_as_shipped_gives_the_same_codes_and_begins_to_sound_before_the_talker_is_done(
    folder: Path, references: list[Spoken]
) -> None:
    assert any(len(expected.codes) > 40 for expected in references), "no reply is long enough to tell"
    with make(folder) as omni:
        for prompt, expected in zip(PROMPTS, references, strict=True):
            parts = list(omni.stream({"prompt_token_ids": prompt}, params()))
            *partial, final = parts
            assert codes_of(final) == expected.codes
            pieces = [audio for part in partial for audio in part.audios]
            assert [piece.start for piece in pieces] == [
                sum(piece.samples.shape[1] for piece in pieces[:index]) for index in range(len(pieces))
            ]
            joined = torch.cat([torch.from_numpy(piece.samples[0].copy()) for piece in pieces])
            torch.testing.assert_close(joined, wave_of(final), rtol=0, atol=0)
            talker, token2wav = final.metrics["talker"], final.metrics["token2wav"]
            first_sound_s = token2wav["started_s"] + token2wav["first_rows_s"]
            if len(expected.codes) > 40:
                assert first_sound_s < talker["started_s"] + talker["ran_s"]


def test_preemption_under_a_tiny_pool_changes_no_code(folder: Path, references: list[Spoken]) -> None:
    keys = ("block_size=4", "kv_memory_mb=null", "num_blocks=22")
    pools = [f"{stage}.{key}" for stage in ("thinker", "talker") for key in keys]
    with make(folder, *pools) as omni:
        outputs = speak(omni, *PROMPTS)
        assert sum(output.metrics["talker"]["preemptions"] for output in outputs) > 0
        for output, expected in zip(outputs, references, strict=True):
            assert list(output.token_ids) == expected.words
            assert codes_of(output) == expected.codes


def test_a_thinker_that_drafts_is_spoken_as_one_that_does_not(folder: Path, references: list[Spoken]) -> None:
    """Words come several at once, their states row by row."""
    with make(folder, "thinker.speculation={method: prompt_lookup, max_tokens: 3, min_ngram: 1}") as omni:
        outputs = speak(omni, *PROMPTS)
        assert sum(output.metrics["thinker"]["drafted_tokens"] for output in outputs) > 0
        for output, expected in zip(outputs, references, strict=True):
            assert list(output.token_ids) == expected.words
            assert codes_of(output) == expected.codes


@pytest.mark.parametrize("stage", ["thinker", "talker", "token2wav"])
def test_leaving_the_stream_ends_every_stage_and_frees_all(folder: Path, stage: str) -> None:
    with make(folder) as omni:
        stream = omni.stream({"prompt_token_ids": PROMPTS[0]}, params())
        for part in stream:
            if stage in part.metrics and not part.finished:
                break
        stream.close()
        assert_idle(omni)
        (output,) = speak(omni, PROMPTS[1])  # and the next one runs
        assert output.audios
        assert_idle(omni)


def assert_idle(omni: Omni) -> None:
    status, metrics = omni.get_status(), omni.get_metrics()
    assert all(stage["tasks"] == 0 for stage in status["stages"].values())
    for name in ("thinker", "talker"):
        stats = metrics["stages"][name]
        assert (stats["num_running"], stats["num_waiting"]) == (0, 0)
        assert stats["num_free_blocks"] == stats["num_blocks"]
    assert metrics["stages"]["token2wav"]["running"] == 0


def test_bytes_are_moved_only_where_somebody_listens(folder: Path) -> None:
    with make(folder) as omni:
        (output,) = speak(omni, PROMPTS[0])
        edges = omni.get_metrics()["edges"]
        width = 2 * 32 * 4  # embedding and state of the thinker, float32
        (prompt,) = [counts for edge, counts in edges.items() if "prompt_states" in edge]
        (reply,) = [counts for edge, counts in edges.items() if "reply_states" in edge]
        assert prompt["bytes"] == len(PROMPTS[0]) * width
        assert reply["bytes"] == (len(output.token_ids) - 1) * width


def test_text_alone_loads_the_thinker_alone(folder: Path, references: list[Spoken]) -> None:
    with make(folder, "outputs=[thinker]") as omni:
        (output,) = omni.generate({"prompt_token_ids": PROMPTS[0]}, params()["thinker"])
        assert list(output.token_ids) == references[0].words
        assert set(output.metrics) == {"thinker"} and not output.audios
        assert set(omni.get_status()["stages"]) == {"thinker"}


def test_an_unknown_speaker_is_refused_and_harms_nobody(folder: Path) -> None:
    with make(folder) as omni:
        prompts = [{"prompt_token_ids": PROMPTS[0], "speaker": "Nobody"}, {"prompt_token_ids": PROMPTS[1]}]
        wrong, right = omni.generate(prompts, params())
        assert "speaker" in str(wrong.error) and "Chelsie" in str(wrong.error)
        assert right.error is None and right.audios


def test_speakers_differ(folder: Path) -> None:
    with make(folder) as omni:
        first, second = omni.generate(
            [{"prompt_token_ids": PROMPTS[0], "speaker": name} for name in ("Chelsie", "Ethan")], params()
        )
        assert codes_of(first) != codes_of(second)


def bad_parts() -> dict[str, tuple[dict[str, Any], str]]:
    """What a message may hold that cannot be run -> words of the refusal."""
    silence = np.zeros(0, np.float32)
    hours = np.broadcast_to(np.zeros(1, np.float32), (10 * 3600 * 16_000,))
    return {
        "a wall": ({"type": "image", "image": huge_png()}, "max_image_pixels"),
        "no sound": ({"type": "audio", "audio": (silence, 16_000)}, "audio"),
        "ten hours": ({"type": "audio", "audio": (hours, 16_000)}, "audio"),
        "no frames": ({"type": "video", "video": np.zeros((0, 8, 8, 3), np.uint8)}, "video"),
        "a page of the web": ({"type": "image", "image": "https://example.org/cat.png"}, "image"),
        "smell": ({"type": "smell", "smell": b"rose"}, "smell"),
    }


def huge_png() -> bytes:
    """A PNG whose header says 30000x30000."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("name", bad_parts())
def test_bad_media_are_refused_and_harm_nobody(omni: Omni, references: list[Spoken], name: str) -> None:
    part, words = bad_parts()[name]
    bad = {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}]}
    refused, right = omni.generate([bad, {"prompt_token_ids": PROMPTS[0]}], params())
    assert isinstance(refused.error, InvalidRequestError) and words in str(refused.error)
    assert codes_of(right) == references[0].codes
    assert_idle(omni)


def test_text_beyond_the_context_is_refused(omni: Omni) -> None:
    (output,) = omni.generate({"prompt": "why " * 600}, params())
    assert isinstance(output.error, InvalidRequestError) and "tokens" in str(output.error)


def test_a_missing_or_damaged_file_is_named_at_load(folder: Path, tmp_path: Path) -> None:
    for name in ("spk_dict.pt", "model-00005-of-00012.safetensors"):
        copy = tmp_path / name.partition(".")[0]
        shutil.copytree(folder, copy)
        (copy / name).unlink()
        with pytest.raises(OmniError, match=name):
            make(copy)
        (copy / name).write_bytes(b"\x10" * 300)
        with pytest.raises(OmniError, match=name):
            make(copy)


def test_an_image_a_sound_and_words_in_words_and_sound_out(omni: Omni) -> None:
    tone = np.sin(np.arange(8_000) * 0.2).astype(np.float32)
    content = [
        {"type": "image", "image": Image.new("RGB", (24, 24), "red")},
        {"type": "audio", "audio": (tone, 16_000)},
        {"type": "text", "text": "What are these?"},
    ]
    first, again, other = omni.generate(
        [
            {"messages": [{"role": "user", "content": content}]},
            {"messages": [{"role": "user", "content": content}]},
            {"messages": [{"role": "user", "content": content[2:]}]},
        ],
        params(),
    )
    assert first.error is None and first.audios[0].samples.size
    assert codes_of(first) == codes_of(again) and first.token_ids == again.token_ids
    assert (first.token_ids, codes_of(first)) != (other.token_ids, codes_of(other))
