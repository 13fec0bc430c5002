"""Time to the first sound and speed of speech: the Qwen2.5-Omni graph against transformers' `generate`.

Both run one checkpoint of middle size with random weights, made for the suite and thrown away. Random weights do not
know when to stop, so both sides write as many tokens and codes as they are told. The peer gives its sound at the end:
its first sound comes then. It takes several requests as one batch of prompts of one length; we get them as requests.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import token2wav
from benchmarks.limits import Limits
from benchmarks.measure import Options, Report, Table, median, with_spread
from benchmarks.sides import Duel, SideProcess, duels

CONFIG = "qwen_omni"
CASES = ((1, 3), (1, 10), (4, 10))  # requests, seconds of sound of each
TEXT_FOLDER = "asset://tiny-image"  # whose tokenizer stands in: prompts are token ids, answers are counted
PROCESSOR = dict(
    image_mean=[0.5, 0.5, 0.5],
    image_std=[0.5, 0.5, 0.5],
    min_pixels=3136,
    max_pixels=12845056,
    patch_size=14,
    merge_size=2,
    temporal_patch_size=2,
    feature_size=128,
    hop_length=160,
    n_fft=400,
    sampling_rate=16000,
)
CODES_PER_S = 50
CODEBOOK, CODEC_VOCABULARY = 8193, 8448
TIMELINE = Path(__file__).resolve().parent / "results" / "speech_timeline.png"
COLUMNS = ("case", "ours, s of sound/s", "transformers, s of sound/s", "ours / transformers", "same codes")
FIRST_COLUMNS = ("case", "ours, s", "transformers, s", "transformers / ours")


@dataclass(frozen=True, slots=True)
class Size:
    """Of the random checkpoint. hidden, layers: of thinker and talker."""

    hidden: int
    layers: int
    dit_hidden: int
    dit_layers: int
    vocoder: int
    vocabulary: int


MIDDLE = Size(hidden=512, layers=8, dit_hidden=256, dit_layers=8, vocoder=192, vocabulary=8000)
PUBLISHED_FLOW = Size(hidden=64, layers=2, dit_hidden=1024, dit_layers=22, vocoder=64, vocabulary=600)
TINY = Size(hidden=64, layers=2, dit_hidden=32, dit_layers=3, vocoder=64, vocabulary=600)


@dataclass(frozen=True, slots=True)
class Case:
    """num_words: tokens that the thinker writes. num_codes: of the talker, fifty to a second of sound."""

    count: int
    num_prompt: int
    num_words: int
    num_codes: int
    vocabulary: int

    def prompts(self, repeat: int) -> list[list[int]]:
        drawn = np.random.default_rng(repeat).integers(3, self.vocabulary - 40, (self.count, self.num_prompt))
        return [[int(token) for token in row] for row in drawn]


class Weights:
    """Writes the random checkpoint, in a process of its own that leaves no trace in the memory of the sides."""

    def write(self, folder: str, size: Size) -> None:
        import torch
        from transformers import Qwen2_5OmniConfig, Qwen2_5OmniForConditionalGeneration

        from vllm_omni.utils.files import resolve_model_folder

        torch.manual_seed(0)
        model = Qwen2_5OmniForConditionalGeneration(Qwen2_5OmniConfig(**_configs(size)))
        with torch.no_grad():
            model.talker.codec_head.weight[CODEBOOK - 1 :] = 0  # greedy choice never ends, and writes only codes
            model.token2wav.code2wav_bigvgan_model.conv_post.weight.mul_(0.1)
        model.save_pretrained(folder)
        voice = {"bos_token": 10, "cond": torch.randn(1, 192), "ref_mel": torch.randn(1, 300, 80)}
        torch.save({"Chelsie": voice}, Path(folder) / "spk_dict.pt")
        shutil.copytree(resolve_model_folder(TEXT_FOLDER) / "tokenizer", folder, dirs_exist_ok=True)
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))


class Ours:
    """All requests at once, each a stream; notes when each gave its first sound."""

    def __init__(self, folder: str, dtype: str) -> None:
        from vllm_omni import AsyncOmni

        outputs = "outputs=[thinker, token2wav, talker.codes]"
        self._omni = AsyncOmni(CONFIG, model=folder, overrides=[outputs], device="cpu", dtype=dtype)
        self._first_s: list[float] = []
        self._last: Any = None
        self._first_of_runs: list[float] = []

    def run(self, case: Case, repeat: int) -> list[list[int]]:
        return asyncio.run(self._run(case, repeat))

    def first_s(self, num_runs: int) -> list[float]:
        """Of each of the last runs: seconds until every request had sounded."""
        return self._first_of_runs[-num_runs:]

    def plot_timeline(self, path: str) -> None:
        """Of the last run's first request."""
        self._last.plot_timeline(path)

    async def _run(self, case: Case, repeat: int) -> list[list[int]]:
        self._first_s = []
        started = time.perf_counter()
        outputs = await asyncio.gather(*(self._listen(case, ids, started) for ids in case.prompts(repeat)))
        self._last = outputs[0]
        self._first_of_runs.append(max(self._first_s))
        return [output.tensors["talker.codes"].tolist() for output in outputs]

    async def _listen(self, case: Case, token_ids: list[int], started: float) -> Any:
        from vllm_omni import DiffusionParams, SamplingParams

        params = {
            "thinker": SamplingParams(temperature=0.0, max_tokens=case.num_words, ignore_eos=True),
            "talker": SamplingParams(temperature=0.0, max_tokens=case.num_codes),
            "token2wav": DiffusionParams(seed=0),
        }
        output, first_s = None, None
        async for output in self._omni.stream({"prompt_token_ids": token_ids}, params):
            if first_s is None and output.audios:
                first_s = time.perf_counter() - started
        if output is None or output.error is not None or first_s is None:
            raise RuntimeError(f"no sound: {output}")
        self._first_s.append(first_s)
        return output


class Transformers:
    """One batch for all requests."""

    def __init__(self, folder: str, dtype: str) -> None:
        from transformers import Qwen2_5OmniForConditionalGeneration

        from vllm_omni.utils.precision import DTYPES

        self._model = Qwen2_5OmniForConditionalGeneration.from_pretrained(folder, dtype=DTYPES[dtype]).eval()
        self._codes: list[list[int]] = []
        self._model.token2wav.register_forward_pre_hook(
            lambda module, arguments: self._codes.extend(arguments[0].tolist())
        )

    def run(self, case: Case, repeat: int) -> list[list[int]]:
        self._codes = []
        token_ids, mask = _padded(case.prompts(repeat))
        self._model.generate(
            input_ids=token_ids,
            attention_mask=mask,
            thinker_max_new_tokens=case.num_words,
            thinker_do_sample=False,
            talker_max_new_tokens=case.num_codes,
            talker_do_sample=False,
        )
        return self._codes


def run(options: Options, limits: Limits | None = None) -> Report:
    size = TINY if options.is_quick else MIDDLE
    with tempfile.TemporaryDirectory() as folder:
        with SideProcess("weights", options.threads, Weights) as writer:
            writer.call("write", folder, size)
        with (
            SideProcess("transformers", options.threads, Transformers, folder, options.dtype) as peer,
            SideProcess("vllm_omni", options.threads, Ours, folder, options.dtype) as us,
        ):
            found, firsts = [], []
            for name, amount, case in cases(options, size):
                (duel,) = duels(us, peer, [(name, amount, case)], same_codes, options)
                found.append(duel)
                firsts.append(first_sound(us, duel))
                if not options.is_quick and case.count == 1:
                    us.call("plot_timeline", str(TIMELINE))
            memory = [[side.name, f"{side.peak_memory_mb():.0f}"] for side in (us, peer)]
        flows, errors = token2wav.flows(folder, options)
    with tempfile.TemporaryDirectory() as folder:
        with SideProcess("weights", options.threads, Weights) as writer:
            writer.call("write", folder, size if options.is_quick else PUBLISHED_FLOW)
        steps, ratios = token2wav.evaluations(folder, options)
    return Report(
        "speech",
        [
            Table(f"Seconds of sound per second, {options.dtype}", COLUMNS, [duel.cells() for duel in found]),
            Table("Seconds until every request sounds", FIRST_COLUMNS, firsts),
            Table("Peak memory, MiB", ("side", "after all cases"), memory),
            steps,
            flows,
        ],
        notes=[
            "Random weights of middle size, 100 mel frames to a second of sound: speed and equality only.",
            "Of 3 s of speech 60% is computed twice, as context of its four chunks; of 10 s 33%.",
            "One evaluation: random weights of the published width and depth, one request, guided and unguided rows.",
            "From codes to spectrograms: all codes as one chunk, ten time points.",
            f"![Timeline of one request]({TIMELINE.name})",
        ],
        figures={
            "duels": [duel.figures() for duel in found],
            "first_sound": firsts,
            "peak_memory_mb": memory,
            "token2wav": [*ratios, *errors],
        },
    )


def first_sound(us: SideProcess, duel: Duel) -> list[str]:
    """In the timed runs; the peer's first sound is its last."""
    ours: list[float] = us.call("first_s", len(duel.us_s))[1]
    ratio = median(duel.peer_s) / median(ours)
    return [duel.case, with_spread(ours, 3), with_spread(duel.peer_s, 3), f"{ratio:.1f}"]


def cases(options: Options, size: Size) -> list[tuple[str, float, Case]]:
    """(name, codes of all requests as seconds of sound, case)."""
    found = []
    for count, seconds in ((2, 0.6),) if options.is_quick else CASES:
        num_codes = round(seconds * CODES_PER_S)
        case = Case(count, 32, max(4, round(4 * seconds)), num_codes, size.vocabulary)
        found.append((f"{count} x {seconds:g} s", count * seconds, case))
    return found


def same_codes(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> str:
    pairs = [(a, b) for mine, other in zip(ours, theirs, strict=True) for a, b in zip(mine, other, strict=True)]
    return f"{sum(a == b for a, b in pairs) / len(pairs):.1%}"


def _padded(prompts: list[list[int]]) -> tuple[Any, Any]:
    """Token ids and mask, one hidden token on the left: transformers drops a mask of ones, without which its talker
    leaves out the marks of the begin.
    """
    import torch

    token_ids = torch.tensor([[0, *prompt] for prompt in prompts])
    mask = torch.ones_like(token_ids)
    mask[:, 0] = 0
    return token_ids, mask


def _configs(size: Size) -> dict[str, Any]:
    special = dict(
        audio_token_index=size.vocabulary - 1,
        image_token_index=size.vocabulary - 2,
        video_token_index=size.vocabulary - 3,
        audio_start_token_id=size.vocabulary - 4,
        audio_end_token_id=size.vocabulary - 5,
        vision_start_token_id=size.vocabulary - 6,
        vision_end_token_id=size.vocabulary - 7,
    )
    heads = size.hidden // 64
    decoder = dict(
        hidden_size=size.hidden,
        intermediate_size=3 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 8, 8]},
    )
    return {
        "thinker_config": dict(
            text_config=dict(**decoder, vocab_size=size.vocabulary, tie_word_embeddings=False),
            vision_config=dict(depth=1, hidden_size=64, intermediate_size=64, num_heads=2, out_hidden_size=size.hidden),
            audio_config=dict(encoder_layers=1, encoder_attention_heads=2, d_model=64, output_dim=size.hidden),
            user_token_id=size.vocabulary - 8,
            **special,
        ),
        "talker_config": dict(
            **decoder,
            **special,
            head_dim=64,
            vocab_size=CODEC_VOCABULARY,
            embedding_size=size.hidden,
            tts_text_start_token_id=size.vocabulary - 9,
            tts_text_end_token_id=size.vocabulary - 10,
            tts_text_pad_token_id=size.vocabulary - 11,
        ),
        "token2wav_config": dict(
            dit_config=dict(
                hidden_size=size.dit_hidden,
                num_hidden_layers=size.dit_layers,
                num_attention_heads=max(1, size.dit_hidden // 64),
                head_dim=min(64, size.dit_hidden),
                emb_dim=128,
                look_ahead_layers=[size.dit_layers // 2],
                look_backward_layers=[0, size.dit_layers - 1],
            ),
            bigvgan_config=dict(upsample_initial_channel=size.vocoder),
        ),
    }
