"""The whole Qwen3-Omni graph against transformers' `generate`: words, frames of codes, waveform; in a crowd, in small
pools, and what is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.media import RATE, picture, read_media, tone
from support.qwen3_omni import CODEC_EOS, NUM_CODES, save_tiny_qwen3_omni, tiny_reference

from vllm_omni import Omni, OmniOutput, SamplingParams
from vllm_omni.config.schema import LimitsConfig
from vllm_omni.engine.ar.tokenizer import TextProcessor
from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.models.qwen3_omni.prompt_reader import Qwen3OmniPromptReader
from vllm_omni.worker.ar.media_prompt import MediaPrompt

NUM_WORDS, NUM_FRAMES = 9, 24
TURN, USER, SYSTEM, ASSISTANT, LINE, END = 96, 86, 84, 66, 0, 97
SHORT = [TURN, USER, LINE, 10, 11, 12, END, LINE, TURN, ASSISTANT, LINE]
LONG = [TURN, SYSTEM, LINE, 30, 31, END, LINE, *SHORT, 50, 51, END, LINE, *SHORT[:3], 40, 41, *SHORT[6:]]
TAPS = (
    "thinker.outputs.prompt_states.layers=[0, 3]",
    "outputs=[thinker, speech, talker.codes]",
    "resources.max_memory_gb=4",
    "thinker.kv_memory_mb=4",
    "talker.kv_memory_mb=4",
)

SMALL_BLOCKS = [f"{part}.{key}" for part in ("thinker", "talker") for key in ("kv_memory_mb=null", "block_size=4")]


@dataclass(frozen=True)
class Spoken:
    words: list[int]
    codes: torch.Tensor  # [frames, codes of a frame]
    wave: torch.Tensor


def seen() -> list[dict[str, Any]]:
    """A system's turn, then pictures, film and sound in turns of the user around an answer."""
    film = np.stack([picture(64, 136, seed) for seed in range(4)])
    return [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "image", "image": picture(24, 40)}, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": "A wave."},
        {
            "role": "user",
            "content": [
                {"type": "video", "video": film, "fps": 2.7},
                {"type": "audio", "audio": (tone(1.3), RATE)},
                {"type": "text", "text": "And?"},
            ],
        },
    ]


PROMPTS: dict[str, Any] = {"short": SHORT, "turns": LONG, "media": seen()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_qwen3_omni(tmp_path_factory.mktemp("qwen3_omni") / "model")


@pytest.fixture(scope="module")
def references(folder: Path) -> dict[str, Spoken]:
    reader = Qwen3OmniPromptReader(folder, TextProcessor(folder).encode, LimitsConfig())
    model = tiny_reference()
    model.talker.config.audio_config = model.config.thinker_config.audio_config  # its positions of audio read it
    media = read_media(reader, PROMPTS["media"])
    return {
        "short": reference(model, SHORT),
        "turns": reference(model, LONG),
        "media": reference(model, list(media.token_ids), **theirs(media)),
    }


def theirs(prompt: MediaPrompt) -> dict[str, torch.Tensor]:
    """The arguments of the reference for a prompt with one of each."""
    by_kind = {item.kind: item.inputs for item in prompt.items}
    features = by_kind["audio"]["features"][None]
    return {
        "pixel_values": by_kind["image"]["pixel_values"],
        "image_grid_thw": by_kind["image"]["grid_thw"][None],
        "pixel_values_videos": by_kind["video"]["pixel_values"],
        "video_grid_thw": by_kind["video"]["grid_thw"][None],
        "video_second_per_grid": by_kind["video"]["second_per_grid"][None],
        "input_features": features,
        "feature_attention_mask": torch.ones(features.shape[::2], dtype=torch.long),
    }


@torch.no_grad()
def reference(model: Any, prompt: list[int], end: int | None = None, **media: torch.Tensor) -> Spoken:
    """transformers' answer, greedy."""
    codes: list[torch.Tensor] = []
    hook = model.code2wav.register_forward_pre_hook(lambda _, given: codes.append(given[0][0].T.clone()))
    ids = torch.tensor([prompt])
    try:
        written, wave = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            thinker_max_new_tokens=NUM_WORDS,
            thinker_do_sample=False,
            thinker_eos_token_id=end,
            talker_max_new_tokens=NUM_FRAMES + 1,  # it speaks nothing of the last
            talker_do_sample=False,
            **media,
        )
    finally:
        hook.remove()
    return Spoken(written[0, len(prompt) :].tolist(), codes[0], wave[0, 0])


def make(folder: Path, *overrides: str) -> Omni:
    given = [*TAPS, *overrides]
    return Omni("qwen3_omni", model=str(folder), overrides=given, device="cpu", dtype="float32", progress=False)


@pytest.fixture(scope="module")
def omni(folder: Path) -> Iterator[Omni]:
    with make(folder) as engine:
        yield engine


def params() -> dict[str, Any]:
    return {
        "thinker": SamplingParams(temperature=0.0, max_tokens=NUM_WORDS, ignore_eos=True),
        "talker": SamplingParams(temperature=0.0, max_tokens=NUM_FRAMES),
    }


def speak(omni: Omni, *names: str, **fields: Any) -> dict[str, OmniOutput]:
    keys = {name: "messages" if name == "media" else "prompt_token_ids" for name in names}
    outputs = omni.generate([{keys[name]: PROMPTS[name], **fields} for name in names], params())
    for output in outputs:
        assert output.error is None, output.error
    return dict(zip(names, outputs, strict=True))


def assert_equal(output: OmniOutput, expected: Spoken) -> None:
    assert list(output.token_ids) == expected.words
    assert output.tensors["talker.codes"].tolist() == expected.codes.tolist()
    wave = torch.from_numpy(output.audios[0].samples[0].copy())
    assert wave.shape == expected.wave.shape
    torch.testing.assert_close(wave, expected.wave, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", PROMPTS)
def test_words_codes_and_waveform_equal_transformers(name: str, omni: Omni, references: dict[str, Spoken]) -> None:
    assert_equal(speak(omni, name)[name], references[name])


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("thinker.max_num_batched_tokens=7", "talker.max_num_batched_tokens=5", "talker.max_num_seqs=2"),
        (*SMALL_BLOCKS, "thinker.num_blocks=12", "talker.num_blocks=14"),
    ],
    ids=["plain", "pieces", "small pools"],
)
def test_a_crowd_in_pieces_and_in_small_pools_changes_nothing(
    overrides: tuple[str, ...], folder: Path, references: dict[str, Spoken]
) -> None:
    is_small = any("num_blocks" in key for key in overrides)
    names = [name for name in PROMPTS if not is_small or name != "media"]
    with make(folder, *overrides) as omni:
        for _ in range(2):  # the second time from the prefix cache
            for name, output in speak(omni, *names).items():
                assert_equal(output, references[name])
        stages = omni.get_metrics()["stages"]
        for part in ("thinker", "talker"):
            assert stages[part]["num_free_blocks"] == stages[part]["num_blocks"]
            assert stages[part]["num_preemptions"] > 0 or not is_small


def test_sound_leaves_while_the_talker_speaks(omni: Omni, references: dict[str, Spoken]) -> None:
    *partial, final = omni.stream({"prompt_token_ids": SHORT}, params())
    pieces = [audio for part in partial for audio in part.audios]
    assert len(pieces) > 2 and pieces[0].samples.shape[1] < 2 * references["short"].wave.numel() / NUM_FRAMES
    wave = torch.from_numpy(np.concatenate([piece.samples[0] for piece in pieces]))
    torch.testing.assert_close(wave, references["short"].wave, rtol=0, atol=1e-3)
    talker, speech = final.metrics["talker"], final.metrics["speech"]
    assert speech["started_s"] + speech["first_rows_s"] < talker["started_s"] + talker["ran_s"]


def test_a_reply_that_ends_early_is_spoken_to_its_end(omni: Omni, references: dict[str, Spoken]) -> None:
    end = references["short"].words[4]
    expected = reference(tiny_reference(), SHORT, end)
    chosen = {**params(), "thinker": SamplingParams(temperature=0.0, max_tokens=NUM_WORDS, stop_token_ids=[end])}
    output = omni.generate({"prompt_token_ids": SHORT}, chosen)[0]
    assert list(output.token_ids) == expected.words
    assert output.tensors["talker.codes"].tolist() == expected.codes.tolist()
    first = references["short"].words[0]
    chosen["thinker"] = SamplingParams(temperature=0.0, stop_token_ids=[first])
    silent = omni.generate({"prompt_token_ids": SHORT}, chosen)[0]
    assert silent.error is None and len(silent.tensors["talker.codes"]) == 0


def test_voices_differ_and_are_found_in_any_case(omni: Omni) -> None:
    spoken = {name: speak(omni, "short", speaker=name)["short"] for name in ("Ethan", "ethan", "chelsie")}
    codes = {name: output.tensors["talker.codes"].tolist() for name, output in spoken.items()}
    assert codes["Ethan"] == codes["ethan"] != codes["chelsie"]


def test_the_end_of_speech_ends_it_and_no_mark_is_spoken(omni: Omni) -> None:
    """Drawn hot, any code comes, but no mark does, and the end ends."""
    lengths: list[int] = []
    for seed in range(3):
        hot = SamplingParams(temperature=30.0, top_k=0, max_tokens=150, seed=seed)
        output = omni.generate({"prompt_token_ids": SHORT}, {**params(), "talker": hot})[0]
        codes = output.tensors["talker.codes"]
        assert output.error is None and int(codes.max()) < NUM_CODES and CODEC_EOS not in codes[:, 0]
        lengths.append(len(codes))
    assert min(lengths) < 150 and len(set(lengths)) > 1
    again = omni.generate({"prompt_token_ids": SHORT}, {**params(), "talker": hot})[0]
    assert again.tensors["talker.codes"].tolist() == codes.tolist(), "a seed draws all codes of its frames"


def test_what_cannot_be_spoken_is_refused(omni: Omni, folder: Path) -> None:
    refused = omni.generate({"prompt_token_ids": SHORT, "speaker": "nobody"}, params())[0]
    assert isinstance(refused.error, InvalidRequestError) and "known: chelsie, ethan" in str(refused.error)
    unmarked = omni.generate({"prompt_token_ids": [10, 11, 12]}, params())[0]
    assert "no turn of the assistant at its end" in str(unmarked.error)
    with pytest.raises(ConfigError, match=r"inputs.prompt_states: got the layers \[0, 2\].*expected \[0, 3\]"):
        make(folder, "thinker.outputs.prompt_states.layers=[0, 2]")
