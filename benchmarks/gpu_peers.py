"""What a GPU gives with transformers and diffusers, on the same folders of random weights, in bfloat16 by torch's own
attention: what `benchmarks.gpu` compares with.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.measure import median
from vllm_omni.utils.device import release_memory


class TransformersWriter:
    """`generate` of a language model."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa")
        self._model, self._device = model.to(device).eval(), device

    def decode_rate(self, prompts: Sequence[Sequence[int]], new_tokens: int, repeats: int) -> float:
        """Tokens per second behind the first, of prompts of one length, greedy."""
        ids = torch.tensor(list(prompts), device=self._device)
        self._write(ids, new_tokens)
        rates = []
        for _ in range(repeats):
            short_s, long_s = (timed(lambda n=n: self._write(ids, n)) for n in (1, 1 + new_tokens))  # type: ignore[misc]
            rates.append(len(prompts) * new_tokens / max(long_s - short_s, 1e-9))
        return median(rates)

    @torch.inference_mode()
    def _write(self, ids: torch.Tensor, count: int) -> None:
        written = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=count,
            max_new_tokens=count,
            pad_token_id=0,
        )
        assert written.shape[1] == ids.shape[1] + count
        written.sum().item()  # waits


class DiffusersPainter:
    """diffusers' ZImagePipeline. Its parts are filled by hand: `from_pretrained` would first draw random weights."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        text_encoder = AutoModelForCausalLM.from_pretrained(folder / "text_encoder", dtype=torch.bfloat16)
        self._pipeline = ZImagePipeline(
            FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
            filled(AutoencoderKL, folder / "vae", device),
            text_encoder.to(device).eval(),
            AutoTokenizer.from_pretrained(folder / "tokenizer"),
            filled(ZImageTransformer2DModel, folder / "transformer", device),
        )
        self._pipeline.set_progress_bar_config(disable=True)

    def seconds(self, prompts: Sequence[str], repeats: int, **params: Any) -> float:
        """Of one call, after one that is not counted."""
        call: Callable[[], Any] = lambda: self._pipeline(list(prompts), **params)  # noqa: E731
        call()
        return median([timed(call) for _ in range(repeats)])


def filled(part: Any, folder: Path, device: torch.device) -> Any:
    """A model of diffusers with the weights of a folder."""
    with torch.device("meta"):
        model = part.from_config(part.load_config(folder))
    model.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors", device=str(device)), assign=True)
    return model.eval().requires_grad_(False)


def timed(work: Callable[[], Any]) -> float:
    """Seconds; the work waits for its own results."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def forget() -> None:
    """Gives back the memory of what is no longer held."""
    gc.collect()
    release_memory()
