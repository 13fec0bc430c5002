"""On a GPU every pipeline gives in float32 what it gives on a CPU: the words, nearly the pictures and audio. In
bfloat16 a request is nearly the same alone and in a crowd; weights that wait in the host's memory change no bit.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ZImageTransformer2DModel
from PIL import Image
from support import flux2, qwen_image, wan
from support.diffusers_folders import random_z_image
from support.lora import random_lora
from support.media import picture
from support.seeing import save_tiny_vl, user

from vllm_omni import DiffusionParams, LoRA, Omni, OmniOutput, SamplingParams
from vllm_omni.config.loader import load_config
from vllm_omni.executor.memory import plan_memory
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.utils.device import compute_capability, is_cuda
from vllm_omni.utils.precision import FP8_CAPABILITY

pytestmark = pytest.mark.cuda
SEED = 11
PROMPTS = ["a red circle left of a blue square", "a yellow ring"]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
MAKE: dict[str, Callable[[Path], Any]] = {
    "z_image": random_z_image,
    "flux2": flux2.whole_pipeline,
    "qwen_image": qwen_image.whole_pipeline,
}
PLAIN = {"height": 64, "width": 64, "num_inference_steps": 3}
SOURCE = Image.fromarray(picture(64, 64, 1))
MASK = Image.fromarray(np.uint8(255) * (np.arange(64)[:, None] < np.arange(64)).astype(np.uint8))


@pytest.fixture(autouse=True)
def float32_is_float32() -> Iterator[None]:
    """Convolutions round float32 to 10 bits where nobody says otherwise."""
    convolution = torch.backends.cudnn.conv
    before, convolution.fp32_precision = convolution.fp32_precision, "ieee"
    yield
    convolution.fp32_precision = before


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A small random checkpoint of each family."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, make in MAKE.items():
        make(root / name)
    return {name: str(root / name) for name in MAKE}


def made(device: object, prompts: Any, params: Any, dtype: str = "float32", **omni: Any) -> list[OmniOutput]:
    with Omni(**omni, device=str(device), dtype=dtype, progress=False) as opened:
        outputs = opened.generate(prompts, params)
    assert all(output.error is None for output in outputs), outputs
    return outputs


def on_both(gpu: torch.device, prompts: list[Any], params: Any, **omni: Any) -> list[list[OmniOutput]]:
    """The outputs of the GPU and of the CPU."""
    return [made(device, prompts, params, **omni) for device in (gpu, "cpu")]


def pixels(output: OmniOutput) -> np.ndarray[Any, Any]:
    return np.asarray(output.images[0]).astype(int)


def assert_same_pictures(ours: list[OmniOutput], theirs: list[OmniOutput], most: int = 4) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert np.abs(pixels(mine) - pixels(other)).max() <= most
        assert pixels(other).std() > 10, "a flat picture would prove nothing"


def test_words(gpu: torch.device) -> None:
    prompts = ["could you draw me a golden hoop", *PROMPTS, "three green squares"]
    for ours, theirs in zip(*on_both(gpu, prompts, GREEDY, model="asset://tiny-image/text_encoder"), strict=True):
        assert ours.token_ids == theirs.token_ids and len(ours.token_ids or ()) == 24


def test_words_of_pictures(gpu: torch.device, tmp_path: Path) -> None:
    save_tiny_vl(tmp_path)
    prompts = [user("See ", picture(24, 40, 0), " what?"), user(picture(64, 16, 1), picture(32, 48, 2), "Compare.")]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    for ours, theirs in zip(*on_both(gpu, prompts, params, model=str(tmp_path)), strict=True):
        assert ours.token_ids == theirs.token_ids and len(ours.token_ids or ()) == 8


def test_pictures(gpu: torch.device) -> None:
    params = [DiffusionParams(seed=SEED), DiffusionParams(seed=SEED, height=96, width=128)]
    assert_same_pictures(*on_both(gpu, PROMPTS, params, config="tiny_image"))


@pytest.mark.parametrize("family", MAKE)
def test_pictures_of_every_family_guided_and_not(family: str, gpu: torch.device, folders: dict[str, str]) -> None:
    params = [
        DiffusionParams(seed=1, guidance_scale=4.0, negative_prompt="fog", **PLAIN),
        DiffusionParams(seed=2, guidance_scale=0.0, **{**PLAIN, "height": 96}),
    ]
    assert_same_pictures(*on_both(gpu, PROMPTS, params, model=folders[family]))


@pytest.mark.parametrize("cache", ["{policy: first_block, threshold: 3.0}", "{policy: taylorseer}"])
def test_step_caches_decide_alike(cache: str, gpu: torch.device, folders: dict[str, str]) -> None:
    params = DiffusionParams(seed=1, guidance_scale=0.0, **{**PLAIN, "num_inference_steps": 8})
    keys = {"model": folders["z_image"], "overrides": [f"image.cache={cache}"]}
    ours, theirs = on_both(gpu, PROMPTS, params, **keys)
    assert_same_pictures(ours, theirs)
    reused = [[output.metrics["image"]["cache_hits"] for output in found] for found in (ours, theirs)]
    assert reused[0] == reused[1] and min(reused[0]) > 0


def test_pictures_from_pictures_and_within_masks(gpu: torch.device, folders: dict[str, str]) -> None:
    prompts = [
        {"prompt": PROMPTS[0], "image": SOURCE, "strength": 0.7},
        {"prompt": PROMPTS[1], "image": SOURCE, "mask": MASK, "strength": 1.0},
    ]
    params = DiffusionParams(seed=1, guidance_scale=0.0, num_inference_steps=4)
    assert_same_pictures(*on_both(gpu, prompts, params, model=folders["z_image"]))


def test_videos_of_words_and_from_a_first_frame(gpu: torch.device, tmp_path: Path) -> None:
    wan.random_pipeline(tmp_path, text=True)
    sizes = {"height": 64, "width": 64, "num_inference_steps": 3}
    params = [DiffusionParams(seed=seed, num_frames=frames, **sizes) for seed, frames in enumerate((9, 5))]
    prompts = [{"prompt": PROMPTS[0], "negative_prompt": "fog"}, {"prompt": PROMPTS[1], "image": SOURCE}]
    for ours, theirs in zip(*on_both(gpu, prompts, params, model=str(tmp_path)), strict=True):
        mine, other = (np.asarray(output.videos[0].frames).astype(int) for output in (ours, theirs))
        assert np.abs(mine - other).max() <= 4
        assert other.std() > 10, "a flat video would prove nothing"


def test_adapters_of_each_request(gpu: torch.device, folders: dict[str, str], tmp_path: Path) -> None:
    reference = ZImageTransformer2DModel.from_pretrained(f"{folders['z_image']}/transformer")
    random_lora(reference, 1).save(tmp_path / "one.safetensors")
    random_lora(reference, 2, rank=6).save(tmp_path / "two.safetensors")
    mixes = [[LoRA("one")], [], [LoRA("two", scale=0.5), LoRA("one", scale=-0.3)]]
    params = [DiffusionParams(seed=1, guidance_scale=0.0, lora=mix, **PLAIN) for mix in mixes]
    keys = {"model": folders["z_image"], "overrides": [f"image.lora.folders=[{tmp_path}]"]}
    ours, theirs = on_both(gpu, [PROMPTS[0]] * 3, params, **keys)
    assert_same_pictures(ours, theirs)
    assert all(np.abs(pixels(theirs[1]) - pixels(theirs[index])).max() > 20 for index in (0, 2))


def test_audio(gpu: torch.device) -> None:
    params = DiffusionParams(seed=SEED, duration_s=2.0)
    for ours, theirs in zip(*on_both(gpu, ["C4 then E4, square"], params, config="tiny_audio"), strict=True):
        assert_same_audio(ours, theirs)


def assert_same_audio(ours: OmniOutput, theirs: OmniOutput) -> None:
    mine, other = (np.asarray(output.audios[0].samples) for output in (ours, theirs))
    assert mine.shape == other.shape
    assert np.abs(mine - other).max() <= 0.01 * np.abs(other).max()


def test_speech_that_is_streamed(gpu: torch.device) -> None:
    finals, pieces = [], []
    for device in (str(gpu), "cpu"):
        with Omni("tiny_speech", device=device, dtype="float32", progress=False) as omni:
            *parts, final = omni.stream("can you read out: 3 7 red?", DiffusionParams(seed=SEED))
        assert final.error is None, final.error
        finals.append(final)
        pieces.append([audio for part in parts for audio in part.audios])
    assert finals[0].text == finals[1].text
    assert_same_audio(*finals)
    heard = np.concatenate([np.asarray(piece.samples) for piece in pieces[0]], axis=-1)
    assert len(pieces[0]) > 1 and np.array_equal(heard, np.asarray(finals[0].audios[0].samples))


@pytest.mark.parametrize("family", MAKE)
def test_a_picture_in_bfloat16_is_nearly_the_same_alone_and_in_a_crowd(
    family: str, gpu: torch.device, folders: dict[str, str]
) -> None:
    """Products of other shapes are summed in another order."""
    params = [DiffusionParams(seed=seed, guidance_scale=0.0, **PLAIN) for seed in range(3)]
    prompts, keys = [*PROMPTS, "three green squares"], {"dtype": "bfloat16", "model": folders[family]}
    crowd = made(gpu, prompts, params, **keys)
    alone = [made(gpu, [prompt], [own], **keys)[0] for prompt, own in zip(prompts[:1], params[:1], strict=True)]
    difference, others = np.abs(pixels(crowd[0]) - pixels(alone[0])), np.abs(pixels(crowd[0]) - pixels(crowd[1]))
    assert difference.mean() < 0.1 * others.mean()


@pytest.mark.parametrize("family", MAKE)
def test_weights_that_wait_in_the_hosts_memory_change_no_bit(
    family: str, gpu: torch.device, folders: dict[str, str]
) -> None:
    if not is_cuda(gpu):
        pytest.skip("refused on a CPU")
    params = [DiffusionParams(seed=seed, guidance_scale=0.0, **PLAIN) for seed in range(2)]
    offload = [f"{stage}.offload=weights" for stage in ("image", "text", "negative")]
    keys = {"dtype": "bfloat16", "model": folders[family]}
    kept, streamed = (made(gpu, PROMPTS, params, overrides=overrides, **keys) for overrides in ([], offload))
    for mine, other in zip(streamed, kept, strict=True):
        assert np.array_equal(pixels(mine), pixels(other))


def test_memory_stays_below_the_plan_while_weights_wait(gpu: torch.device, tmp_path: Path) -> None:
    if not is_cuda(gpu):
        pytest.skip("refused on a CPU")
    from benchmarks.gpu_shapes import TINY_QWEN3, TINY_VAE, Z_IMAGE
    from benchmarks.random_weights import z_image_folder

    shape = {**Z_IMAGE, "dim": 1536, "n_heads": 12, "n_kv_heads": 12, "n_layers": 12, "cap_feat_dim": 32}
    folder = z_image_folder(tmp_path / "wide", transformer=shape, vae=TINY_VAE, text_encoder=TINY_QWEN3)
    pools = ["text.kv_memory_mb=16", "negative.kv_memory_mb=16"]
    overrides = ["image.offload=weights", *pools]
    pipeline = Pipeline(load_config("z_image", model=str(folder), overrides=[*overrides, f"device={gpu}"]))
    plan = plan_memory(pipeline)["image"]
    assert plan.offloaded_bytes > 3 * plan.weights_bytes
    params = DiffusionParams(seed=1, guidance_scale=0.0, height=256, width=256, num_inference_steps=2)
    gc.collect()
    empty = torch.cuda.memory_allocated(gpu)
    with Omni("z_image", model=str(folder), device=str(gpu), overrides=overrides, progress=False) as omni:
        loaded = torch.cuda.memory_allocated(gpu)
        torch.cuda.reset_peak_memory_stats(gpu)
        assert omni.generate(PROMPTS[0], params)[0].error is None
        assert torch.cuda.max_memory_allocated(gpu) - loaded <= plan.total_bytes - plan.weights_bytes
    assert loaded - empty < plan.offloaded_bytes / 2


def test_weights_in_float8_draw_nearly_the_same(gpu: torch.device, folders: dict[str, str]) -> None:
    if not is_cuda(gpu) or compute_capability(gpu) < FP8_CAPABILITY:
        pytest.skip("needs a GPU that multiplies float8")
    params = [DiffusionParams(seed=seed, guidance_scale=0.0, **PLAIN) for seed in range(2)]
    keys = {"dtype": "bfloat16", "model": folders["z_image"]}
    plain = made(gpu, PROMPTS, params, **keys)
    overrides = ["image.quantization=fp8", "image.offload=weights"]
    for mine, other in zip(made(gpu, PROMPTS, params, overrides=overrides, **keys), plain, strict=True):
        difference = np.abs(pixels(mine) - pixels(other))
        assert 0 < difference.mean() < 0.5 * pixels(other).std()
