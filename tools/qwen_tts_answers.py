"""What the qwen-tts package answers for the tiny folders of tests/support/qwen3_tts.py; runs in its environment.

Every answer is computed in double precision as well, and refused where a code differs: a tie that rounding decides
would make a test that fails on another machine.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
import transformers
from support.qwen3_tts import (
    DATA,
    SAMPLE_RATE,
    Case,
    codes,
    config,
    sound,
    write_folder,
    write_speech_tokenizer,
)
from support.qwen3_tts_configs import tiny_tokenizer_config

from benchmarks.peers.qwen_tts_package import qwen_tts

package = qwen_tts()
from qwen_tts.core import Qwen3TTSTokenizerV2Config, Qwen3TTSTokenizerV2Model  # noqa: E402
from qwen_tts.core.models import Qwen3TTSConfig, Qwen3TTSForConditionalGeneration  # noqa: E402

FRAMES = 8
CODEC_FRAMES = 30  # more than the decoder's window
SOUNDS_S = (0.35, 0.9, 1.504)  # whole frames of 80 ms, and not
LONG = "Hello world, hello again: one, two, three."
CASES = (
    Case("speaker", "custom_voice", LONG, "english", True, speaker="ryan"),
    Case("speaker_whole_text", "custom_voice", LONG, "english", False, speaker="ryan"),
    Case("speaker_auto", "custom_voice", "你好 world", "auto", True, speaker="vivian"),
    Case("dialect_auto", "custom_voice", LONG, "auto", True, speaker="eric"),
    Case("dialect_chinese", "custom_voice", "你好", "chinese", True, speaker="dylan"),
    Case("dialect_unused", "custom_voice", LONG, "english", True, speaker="eric"),
    Case("speaker_instruct", "custom_voice", LONG, "auto", True, speaker="serena", instruct="Very slowly."),
    Case("one_token", "custom_voice", "hello", "english", True, speaker="ryan"),
    Case("design", "voice_design", LONG, "german", True, instruct="An old man."),
    Case("design_whole_text", "voice_design", LONG, "auto", False, instruct="An old man."),
    Case("design_plain", "voice_design", LONG, "auto", True),
    Case("clone", "base", LONG, "english", True, sound_s=0.9),
    Case("clone_whole_text", "base", LONG, "auto", False, sound_s=0.9),
    Case("in_context_long_text", "base", LONG, "english", True, sound_s=0.9, ref_text="hello world"),
    Case("in_context_short_text", "base", "hello", "auto", True, sound_s=1.504, ref_text="hello"),
    Case("in_context_whole_text", "base", LONG, "english", False, sound_s=0.9, ref_text="hello world"),
)


def main() -> int:
    torch.set_num_threads(1)
    DATA.mkdir(parents=True, exist_ok=True)
    _write(DATA / "cases.json", [asdict(case) for case in CASES])
    _write(DATA / "layouts.json", layouts(), indent=None)
    found: dict[str, np.ndarray[Any, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for task in ("custom_voice", "voice_design", "base"):
            folder = write_folder(Path(temporary) / task, task)
            mine = [case for case in CASES if case.task == task]
            found |= agreed(lambda dtype, folder=folder, mine=mine: answers(folder, mine, dtype))
        folder = write_speech_tokenizer(Path(temporary) / "speech_tokenizer")
        found |= agreed(lambda dtype: codec_answers(folder, dtype))
    made_by = {"qwen-tts": "0.1.1", "transformers": transformers.__version__, "torch": torch.__version__}
    found = {name: np.ascontiguousarray(array) for name, array in found.items()}  # a view would be written as it lies
    safetensors.numpy.save_file(found, DATA / "answers.safetensors", made_by)
    (DATA / "answers.safetensors").chmod(0o644)
    for name, array in found.items():
        print(f"{name} {array.dtype} {list(array.shape)} {np.abs(array).max():.3f}")
    return 0


def layouts() -> dict[str, dict[str, list[int]]]:
    """Shape by name of every tensor in each file."""
    made = {}
    for task in ("custom_voice", "voice_design", "base"):
        made[task] = shapes(Qwen3TTSForConditionalGeneration(Qwen3TTSConfig(**config(task))))
    codec = Qwen3TTSTokenizerV2Model(Qwen3TTSTokenizerV2Config(**tiny_tokenizer_config()))
    made["speech_tokenizer"] = shapes(codec)
    return made


def shapes(model: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def agreed(answer: Any) -> dict[str, Any]:
    """Answers in float32, whose codes are those of float64."""
    single, double = answer(torch.float32), answer(torch.float64)
    for name, array in single.items():
        if array.dtype.kind == "i":
            assert np.array_equal(array, double[name]), f"{name}: rounding decides"
        else:
            print(f"{name}: float32 is off by {np.abs(array - double[name]).max():.1e}")
    return single


def answers(folder: Path, mine: list[Case], dtype: torch.dtype) -> dict[str, Any]:
    model = package.Qwen3TTSModel.from_pretrained(str(folder), dtype=torch.float32, attn_implementation="eager")
    model.model.to(dtype)
    model.model.speech_tokenizer.model.to(dtype)
    found: dict[str, Any] = {}
    for case in mine:
        with recorded(model) as record:
            waves, rate = speak(model, case, record)
        assert rate == SAMPLE_RATE
        found |= {f"{case.name}.{name}": array for name, array in record.items()}
        found[f"{case.name}.waveform"] = waves[0].astype(np.float32)
    return found


def speak(model: Any, case: Case, record: dict[str, Any]) -> tuple[list[Any], int]:
    greedy = {"do_sample": False, "subtalker_dosample": False, "max_new_tokens": FRAMES + 1}
    asked = {"text": case.text, "language": case.language, "non_streaming_mode": not case.streams_text, **greedy}
    if case.task == "custom_voice":
        return model.generate_custom_voice(speaker=case.speaker, instruct=case.instruct, **asked)
    if case.task == "voice_design":
        return model.generate_voice_design(instruct=case.instruct or "", **asked)
    item = model.create_voice_clone_prompt(
        (sound(case.sound_s), SAMPLE_RATE), case.ref_text, x_vector_only_mode=case.ref_text is None
    )
    record["embedding"] = item[0].ref_spk_embedding.float().numpy()
    if item[0].ref_code is not None:
        record["ref_codes"] = item[0].ref_code.numpy()
    return model.generate_voice_clone(voice_clone_prompt=item, **asked)


@contextmanager
def recorded(model: Any) -> Iterator[dict[str, Any]]:
    """What passes between the package's parts while it speaks once."""
    record: dict[str, Any] = {}
    whole, talker, predictor = model.model, model.model.talker, model.model.talker.code_predictor
    plain_whole, plain_talker, plain_predictor = whole.generate, talker.generate, predictor.generate
    residual: list[torch.Tensor] = []

    def generate(input_ids: Any, **asked: Any) -> Any:
        for name, ids in (
            ("input_ids", input_ids),
            ("instruct_ids", asked.get("instruct_ids")),
            ("ref_ids", asked.get("ref_ids")),
        ):
            if ids is not None and ids[0] is not None:
                record[name] = ids[0][0].numpy()
        made = plain_whole(input_ids=input_ids, **asked)
        record["codes"] = made[0][0].numpy()
        return made

    def talk(**asked: Any) -> Any:
        record["prompt"] = asked["inputs_embeds"][0].float().numpy()
        record["trailing"] = asked["trailing_text_hidden"][0].float().numpy()
        made = plain_talker(output_logits=True, **asked)
        kept = whole.config.talker_config.code_predictor_config.vocab_size + 110
        record["logits"] = torch.cat(made.logits)[:FRAMES, :kept].float().numpy()
        return made

    def predict(**asked: Any) -> Any:
        made = plain_predictor(output_logits=True, **asked)
        residual.append(torch.cat(made.logits))
        return made

    whole.generate, talker.generate, predictor.generate = generate, talk, predict
    yield record
    record["residual_logits"] = torch.stack(residual[:2]).float().numpy()
    whole.generate, talker.generate, predictor.generate = plain_whole, plain_talker, plain_predictor


def codec_answers(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    codec = package.Qwen3TTSTokenizer.from_pretrained(str(folder), dtype=torch.float32, attn_implementation="eager")
    codec.model.to(dtype)
    found: dict[str, Any] = {"codec.codes": codes(CODEC_FRAMES)}
    found["codec.waveform"] = codec.decode([{"audio_codes": found["codec.codes"]}])[0][0]
    for seconds in SOUNDS_S:
        found[f"encoder.{seconds}.codes"] = codec.encode(sound(seconds), sr=SAMPLE_RATE).audio_codes[0].numpy()
    return found


def _write(file: Path, value: Any, indent: int | None = 1) -> None:
    file.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
