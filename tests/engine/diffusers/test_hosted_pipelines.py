"""Pipelines of other families through the adapter: loaded by their folder alone, what they give found and read, their
noise the request's, their pictures in the form that they expect.
"""

from __future__ import annotations

import functools
import json
import shutil
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
from support.diffusers_folders import RATE, engine, random_stable_audio, run, task
from support.diffusers_folders import made as finished
from support.engines import spec_of
from support.tiny_parts import image_processor, unet, vae
from support.tiny_pipelines import flux, made, save, stable_diffusion, stable_diffusion_xl

from vllm_omni import Audio, DiffusionParams, Omni, OmniOutput
from vllm_omni.config.schema import LimitsConfig, StageConfig
from vllm_omni.engine.base import Activity
from vllm_omni.engine.diffusers import pipeline_inputs
from vllm_omni.engine.diffusers.options import DiffusersOptions
from vllm_omni.engine.diffusers.pipeline_class import given_kind, pipeline_class
from vllm_omni.engine.diffusers.pipeline_result import result_tensor
from vllm_omni.entrypoints.cli.graph_report import describe
from vllm_omni.entrypoints.loading import open_pipeline
from vllm_omni.errors import CheckpointError, ConfigError, InvalidRequestError, OmniError, StageError
from vllm_omni.executor.memory import plan_memory
from vllm_omni.executor.pipeline import Pipeline


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders by name, each made once."""
    makers: dict[str, Callable[[], Any]] = {
        "sd": stable_diffusion,
        "sdxl": stable_diffusion_xl,
        "flux": flux,
        "img2img": lambda: stable_diffusion("StableDiffusionImg2ImgPipeline"),
        "inpaint": lambda: stable_diffusion("StableDiffusionInpaintPipeline", unet=unet(in_channels=9)),
        "kontext": lambda: flux("FluxKontextPipeline"),
    }

    @functools.cache
    def folder(name: str) -> Path:
        torch.manual_seed(0)
        path = tmp_path_factory.mktemp(name)
        save(makers[name](), path)
        return path

    return folder


@pytest.fixture
def load() -> Iterator[Callable[..., Omni]]:
    opened: list[Omni] = []

    def loaded(folder: Path, **keys: Any) -> Omni:
        stage = {"kind": "diffusers", "model": str(folder), **keys}
        opened.append(Omni({"stages": {"s": stage}, "outputs": ["s"]}, progress=False))
        return opened[-1]

    yield loaded
    for omni in opened:
        omni.close()


def small(seed: int = 1, **rest: Any) -> DiffusionParams:
    return DiffusionParams(**{"seed": seed, "num_inference_steps": 2, "height": 32, "width": 32, **rest})


def pixels(output: OmniOutput) -> np.ndarray:
    assert output.error is None, output.error
    return np.asarray(output.images[0]).astype(int)


def error(output: OmniOutput) -> str:
    assert isinstance(output.error, OmniError), "it was not refused"
    return str(output.error)


def plain(folder: Path) -> Any:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_scheduler(folder: Path, to: Path, scheduler: Any) -> Path:
    shutil.copytree(folder, to)
    scheduler.save_pretrained(to / "scheduler")
    index = json.loads((to / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (to / "model_index.json").write_text(json.dumps(index))
    return to


# By the folder alone


@pytest.mark.parametrize("name", ["sd", "sdxl", "flux"])
def test_a_folder_alone_equals_plain_diffusers_and_check_says_how_it_runs(
    folders: Callable[[str], Path], name: str
) -> None:
    folder = folders(name)
    config = open_pipeline(model=str(folder)).config
    pipeline = Pipeline(config)
    report = " ".join(describe(pipeline, plan_memory(pipeline)).split())
    reference = plain(folder)
    assert f"{type(reference).__name__} of diffusers, hosted as it is (gives image)" in report
    with Omni(model=str(folder), progress=False) as omni:
        (output,) = omni.generate("a cat", small(3))
    expected = reference("a cat", height=32, width=32, num_inference_steps=2, generator=generator(3)).images[0]
    assert np.array_equal(pixels(output), np.asarray(expected))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("KandinskyPriorPipeline", "image_embeds"),
        ("MarigoldDepthPipeline", "prediction"),
        ("FluxPriorReduxPipeline", "prompt_embeds"),
        ("DiffusionGemmaPipeline", "texts"),
        ("FluxModularPipeline", "no DiffusionPipeline"),
        ("NoSuchPipeline", "that diffusers exports"),
    ],
)
def test_what_a_stage_cannot_give_is_refused_at_load(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(ConfigError, match=message):
        open_pipeline(model=str(tmp_path))


def test_what_a_class_gives_is_found() -> None:
    kinds = {
        "Kandinsky5T2IPipeline": "image",
        "KandinskyCombinedPipeline": "image",
        "QwenImageLayeredPipeline": "image",
        "StableAudioPipeline": "audio",
        "AudioLDM2Pipeline": "audio",
        "UniDiffuserPipeline": "image",
        "StableCascadeCombinedPipeline": "image",
        "StableVideoDiffusionPipeline": "video",
        "LTX2Pipeline": "video",
        "CosmosTextToWorldPipeline": "video",
    }
    assert {name: given_kind(pipeline_class(name)) for name in kinds} == kinds


def test_a_result_is_read_whatever_its_field_or_nesting_is_called() -> None:
    red, blue = Image.new("RGB", (8, 4), "red"), Image.new("RGB", (8, 4), "blue")
    clear = Image.new("RGBA", (8, 4), (255, 0, 0, 0))
    array = np.stack([np.asarray(red), np.asarray(blue)]) / 255
    results: list[tuple[Any, int]] = [
        (types.SimpleNamespace(images=[red, blue]), 2),
        (types.SimpleNamespace(image=[red]), 1),
        (types.SimpleNamespace(images=[[red, blue], [red, blue]]), 4),
        (types.SimpleNamespace(images=[[[red], [blue]]]), 2),
        (types.SimpleNamespace(images=red), 1),
        (types.SimpleNamespace(images=array), 2),
        (types.SimpleNamespace(images=torch.from_numpy(array).permute(0, 3, 1, 2)), 2),
        (types.SimpleNamespace(rgb=[red], depth=[blue]), 1),
    ]
    for result, count in results:
        tensor = result_tensor(result, "image")
        assert tensor.shape == (count, 4, 8, 3) and tensor.dtype == torch.uint8
        assert tensor[0, 0, 0].tolist() == [255, 0, 0]
    assert (result_tensor(types.SimpleNamespace(images=[[clear]]), "image") == 255).all(), "what is clear is white"
    for mode in ("LA", "La", "RGBa"):
        layer = clear.convert("LA").convert(mode) if mode == "La" else clear.convert(mode)
        assert (result_tensor(types.SimpleNamespace(images=[layer]), "image") == 255).all(), mode
    for bad in ([red, Image.new("RGB", (4, 4))], [], ["x"], np.full((1, 4, 4, 3), np.nan)):
        with pytest.raises(StageError):
            result_tensor(types.SimpleNamespace(images=bad), "image")


# The index


def test_lists_in_the_index_that_are_no_class_are_settings(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "x"
    shutil.copytree(folders("sd"), folder)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"sample_sigmas": [1.0, 0.5], "select_layers": [2, 5, 8], "pair": [[1, 2], [3, 4]], "more": {"a": [1]}}
    index |= {"empty": [], "gone": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    options = DiffusersOptions()
    stage = StageConfig(name="s", kind="diffusers", model=str(folder), options=options)
    assert spec_of(stage).plan_memory().weights_bytes > 0
    for bad in (["os", "system"], ["my_code", "MyModel"], ["diffusers.pipelines", None]):
        (folder / "model_index.json").write_text(json.dumps({**index, "vae": bad}))
        with pytest.raises(ConfigError, match="custom code is not run"):
            spec_of(stage)


def test_two_words_are_a_setting_and_a_module_with_a_class_is_code(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    def index(**entries: Any) -> Path:
        folder = tmp_path / "x"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(folders("sd"), folder)
        old = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**old, **entries}))
        return folder

    for setting in (["alpha", "beta"], ["<a>", "<b>"], ["transformers", None], [None, None], [None, "x"]):
        with Omni(model=str(index(words=setting)), progress=False) as omni:
            assert omni.generate("a cat", small())[0].error is None, setting
    for code in (["my_module", "MyClass"], ["os.path", "X"], ["os", "system"], ["posix", "system"], ["json.tool", "x"]):
        with pytest.raises(ConfigError, match=r"words: got .*custom code is not run"):
            open_pipeline(model=str(index(words=code)))
    with pytest.raises(ConfigError, match=r"unet: got .*custom code is not run"):
        open_pipeline(model=str(index(unet=["my_module", "my_class"])))
    for part in ("safety_checker", "scheduler"):
        with pytest.raises(ConfigError, match=rf"{part}: got null, expected \[library, class\], or \[null, null\]"):
            open_pipeline(model=str(index(**{part: None})))


def test_settings_of_krea_2_are_no_code(tmp_path: Path) -> None:
    from vllm_omni.engine.diffusers.pipeline_folder import PipelineFolder

    index = {
        "_class_name": "Krea2Pipeline",
        "text_encoder_select_layers": [2, 5],
        "is_distilled": True,
        "patch_size": 2,
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert PipelineFolder(tmp_path).components == {}


def test_a_part_that_is_missing_is_named(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "x"
    shutil.copytree(folders("sd"), folder)
    shutil.rmtree(folder / "unet")
    with pytest.raises(CheckpointError, match=r"unet: missing, though model_index.json names diffusers.UNet2D"):
        open_pipeline(model=str(folder))


def test_a_library_that_is_missing_is_named_at_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "PRXPipeline"}))
    from diffusers.pipelines.prx import pipeline_prx

    from vllm_omni.engine.diffusers import pipeline_class as module

    module._unguarded_imports.cache_clear()
    monkeypatch.delattr(pipeline_prx, "ftfy", raising=False)
    with pytest.raises(ConfigError, match="PRXPipeline needs a library that is not installed: pip install ftfy"):
        open_pipeline(model=str(tmp_path))
    module._unguarded_imports.cache_clear()
    assert pipeline_class("PixArtAlphaPipeline"), "it asks for ftfy before it uses it"


def test_a_model_that_needs_accelerate_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "transformer").mkdir()
    monkeypatch.setattr("diffusers.utils.is_accelerate_available", lambda: False)
    with pytest.raises(ConfigError, match=r"transformer: .*WanTransformer3DModel .*pip install accelerate"):
        open_pipeline(model=str(tmp_path))


# Variants


def test_the_only_variant_is_found_and_another_can_be_named(tmp_path: Path, load: Callable[..., Omni]) -> None:
    torch.manual_seed(0)
    pipeline = stable_diffusion()
    pipeline.save_pretrained(tmp_path / "fp16", variant="fp16")
    with Omni(model=str(tmp_path / "fp16"), progress=False) as omni:
        (found,) = omni.generate("a cat", small())
    pipeline.save_pretrained(tmp_path / "both", variant="fp16")
    other = stable_diffusion()
    other.save_pretrained(tmp_path / "both")
    plain_weights, fp16 = load(tmp_path / "both"), load(tmp_path / "both", variant="fp16")
    (ours,), (named,) = plain_weights.generate("a cat", small()), fp16.generate("a cat", small())
    assert np.array_equal(pixels(found), pixels(named)) and not np.array_equal(pixels(ours), pixels(named))
    with pytest.raises(ConfigError, match=r"variant: got 'bf16', but .* has fp16"):
        load(tmp_path / "both", variant="bf16")
    pipeline.save_pretrained(tmp_path / "fp16", variant="bf16")
    with pytest.raises(ConfigError, match=r"variant: .* has bf16, fp16 and no plain weights"):
        load(tmp_path / "fp16")


def with_variants(folder: Path, source: Path, **parts: list[str | None]) -> Path:
    """A copy in which the weights of each part are there in these variants."""
    shutil.copytree(source, folder)
    for part, variants in parts.items():
        (plain_file,) = (folder / part).glob("*.safetensors")
        content = plain_file.read_bytes()
        plain_file.unlink()
        for variant in variants:
            plain_file.with_suffix(f".{variant}.safetensors" if variant else ".safetensors").write_bytes(content)
    return folder


def test_the_one_variant_that_serves_all_parts_is_taken(
    folders: Callable[[str], Path], tmp_path: Path, load: Callable[..., Omni]
) -> None:
    omni = load(with_variants(tmp_path / "x", folders("sd"), unet=["fp16", "bf16"], vae=["fp16"], text_encoder=[None]))
    (output,) = omni.generate("a cat", small())
    assert output.error is None
    with pytest.raises(ConfigError, match=r"variant: got 'bf16', but .* has fp16 alone of vae"):
        load(tmp_path / "x", variant="bf16")
    none = with_variants(tmp_path / "none", folders("sd"), unet=["fp16"], vae=["bf16"])
    with pytest.raises(ConfigError, match=r"has fp16 alone of unet, bf16 alone of vae and no one variant of all"):
        load(none)


# Noise


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.EulerAncestralDiscreteScheduler(),
        diffusers.LCMScheduler(),
        diffusers.DPMSolverSDEScheduler(),
        diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
        diffusers.DDPMScheduler(),
        diffusers.KDPM2AncestralDiscreteScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_seed_is_one_picture_with_samplers_that_draw(
    folders: Callable[[str], Path], tmp_path: Path, load: Callable[..., Omni], scheduler: Any
) -> None:
    omni = load(with_scheduler(folders("sd"), tmp_path / "x", scheduler))
    (alone,) = omni.generate("a cat", small(7, num_inference_steps=4))
    torch.manual_seed(5)
    crowd = omni.generate(["a dog", "a cat", "a cow"], [small(seed, num_inference_steps=4) for seed in (1, 7, 7)])
    assert np.array_equal(pixels(alone), pixels(crowd[1])) and not np.array_equal(pixels(alone), pixels(crowd[2]))


def test_a_stochastic_flow_draws_from_the_seed(
    folders: Callable[[str], Path], tmp_path: Path, load: Callable[..., Omni]
) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    omni = load(with_scheduler(folders("flux"), tmp_path / "x", scheduler))
    pictures = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(pictures))
        (output,) = omni.generate("a cat", small(seed, num_inference_steps=4))
        pictures.append(pixels(output))
    assert np.array_equal(pictures[0], pictures[1]) and not np.array_equal(pictures[0], pictures[2])


# What is not finite, and what is blanked


def test_nan_from_the_vae_is_a_failure(
    folders: Callable[[str], Path], load: Callable[..., Omni], monkeypatch: pytest.MonkeyPatch
) -> None:
    omni = load(folders("sd"))
    (good,) = omni.generate("a cat", small())
    whole = diffusers.AutoencoderKL.decode

    def damaged(self: Any, *arguments: Any, **rest: Any) -> Any:
        sample = whole(self, *arguments, return_dict=False)[0].clone()
        sample[..., :2] = float("nan")
        return (sample,)

    monkeypatch.setattr(diffusers.AutoencoderKL, "decode", damaged)
    (bad,) = omni.generate("a cat", small())
    assert "not finite" in error(bad)
    monkeypatch.undo()
    (again,) = omni.generate("a cat", small())
    assert np.array_equal(pixels(good), pixels(again))


def test_a_picture_that_the_safety_checker_blanked_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    torch.manual_seed(0)
    config = CLIPConfig(
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "intermediate_size": 16,
            "projection_dim": 16,
        },
        text_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 16},
        projection_dim=16,
    )
    checker = StableDiffusionSafetyChecker(config)
    checker.concept_embeds_weights.fill_(-2.0)  # every similarity is above it
    checker.special_care_embeds_weights.fill_(2.0)
    save(stable_diffusion(safety_checker=checker, feature_extractor=image_processor()), tmp_path)
    with Omni(model=str(tmp_path), progress=False) as omni:
        (output,) = omni.generate("a cat", small())
    assert output.metrics["result"]["blanked_by_safety_checker"] == [0] and not pixels(output).any()


# Pictures and sounds that a request brings


def picture(mode: str = "RGB", size: tuple[int, int] = (32, 32)) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "1", "LA"])
def test_a_picture_of_any_mode_gives_what_its_rgb_gives(
    folders: Callable[[str], Path], load: Callable[..., Omni], mode: str
) -> None:
    omni = load(folders("img2img"))
    given = picture(mode)
    as_rgb = given.convert("RGB")
    value = DiffusionParams(seed=1, num_inference_steps=4, strength=0.6, image=given)
    (output,) = omni.generate("a cat", value)
    expected = plain(folders("img2img"))(
        "a cat", image=as_rgb, num_inference_steps=4, strength=0.6, generator=generator(1)
    ).images[0]
    assert np.array_equal(pixels(output), np.asarray(expected))


def test_a_picture_is_upright_and_may_be_a_path_or_stand_in_the_prompt(
    folders: Callable[[str], Path], load: Callable[..., Omni], tmp_path: Path
) -> None:
    omni = load(folders("img2img"))
    turned = picture(size=(64, 32))
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    value = DiffusionParams(seed=1, num_inference_steps=4, strength=0.6)
    (by_path,) = omni.generate({"prompt": "a cat", "image": str(tmp_path / "turned.png")}, value)
    upright = turned.transpose(Image.Transpose.ROTATE_270)
    (by_value,) = omni.generate("a cat", DiffusionParams(seed=1, num_inference_steps=4, strength=0.6, image=upright))
    assert pixels(by_path).shape == (64, 32, 3) and np.array_equal(pixels(by_path), pixels(by_value))
    both = DiffusionParams(image=upright)
    (twice,) = omni.generate({"prompt": "a cat", "image": upright}, both)
    assert "the parameters say it too" in error(twice)


def test_masks_are_taken_in_any_mode(folders: Callable[[str], Path], load: Callable[..., Omni]) -> None:
    omni = load(folders("inpaint"))
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (8, 8, 24, 24))
    pictures = []
    for mode in ("L", "RGB", "1"):
        value = small(num_inference_steps=4, image=picture(), mask=mask.convert(mode))
        pictures.append(pixels(omni.generate("a cat", value)[0]))
    assert all(np.array_equal(pictures[0], each) for each in pictures)
    in_prompt = {"prompt": "a cat", "image": picture(), "mask": mask}
    assert np.array_equal(pixels(omni.generate(in_prompt, small(num_inference_steps=4))[0]), pictures[0])


BAD: list[tuple[dict[str, Any], str]] = [
    ({"image": Image.new("L", (4000, 4000))}, r"image: width \* height"),
    ({"image": [picture()] * 65}, "image: number of images"),
    ({"image": "nowhere.png"}, "image: got 'nowhere.png'"),
    ({"image": Image.new("RGB", (1, 1))}, "image: got 1x1 pixels, expected at least 2 pixels a side"),
    ({"image": [picture(), Image.new("RGB", (64, 1))]}, "image: got 64x1 pixels"),
    ({"image": picture(), "mask": Image.new("L", (1, 32))}, "mask: got 1x32 pixels"),
    ({"image": picture(), "mask": Image.new("L", (4000, 4000))}, r"mask: width \* height"),
    ({"image": picture(), "mask": "nowhere.png"}, "mask"),
    ({"image": picture(), "mask": 3.5j}, "mask"),
    ({"image": picture(), "extra": {"latents": torch.zeros(1, 4, 4096, 4096)}}, "extra.latents: number of values"),
    ({"image": picture(), "extra": {"latents": torch.full((1, 4, 16, 16), float("nan"))}}, "not finite"),
    ({"image": picture(), "extra": {"cross_attention_kwargs": {"scale": float("inf")}}}, "cross_attention_kwargs"),
    ({"image": picture(), "extra": {"cross_attention_kwargs": [[[[[[1]]]]]]}}, "deeper"),
    ({"image": picture(), "extra": {"timesteps": list(range(20_000))}}, "timesteps"),
    ({"image": picture(), "extra": {"eta": object()}}, "extra.eta"),
    ({"image": picture(), "extra": {"clip_skip": 10**12}}, "clip_skip"),
]


@pytest.mark.parametrize(("bad", "message"), BAD, ids=[message for _, message in BAD])
def test_everything_that_a_request_brings_has_limits(
    folders: Callable[[str], Path], load: Callable[..., Omni], bad: dict[str, Any], message: str
) -> None:
    (output,) = load(folders("inpaint")).generate("a cat", DiffusionParams(**bad))
    assert isinstance(output.error, InvalidRequestError)
    assert message.replace("\\", "") in error(output)


def test_pictures_are_read_beside_the_loop_and_an_abort_does_not_wait_for_them(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: list[str] = []
    may_go_on = threading.Event()
    whole = pipeline_inputs.read_image

    def slow(*arguments: Any) -> Any:
        readers.append(threading.current_thread().name)
        may_go_on.wait(10)
        return whole(*arguments)

    monkeypatch.setattr(pipeline_inputs, "read_image", slow)
    stage = engine(folders("img2img"), "image")
    value = DiffusionParams(seed=1, image=picture(), num_inference_steps=4)
    for name in ("gone", "kept"):
        stage.submit(task(name, "a cat", value))
    assert stage.activity() is Activity.PENDING, stage.step()
    assert stage.step() == []
    stage.abort("gone")
    may_go_on.set()
    assert set(finished(run(stage), "image")) == {"kept"} and stage.activity() is Activity.IDLE
    assert readers and all(name.startswith("omni-background") for name in readers)


def test_lists_of_pictures_are_taken(folders: Callable[[str], Path], load: Callable[..., Omni]) -> None:
    omni = load(folders("kontext"))
    one = pixels(omni.generate("a cat", small(image=picture("L"), extra={"max_area": 1024, "_auto_resize": False}))[0])
    several = pixels(
        omni.generate("a cat", small(image=[picture("L")], extra={"max_area": 1024, "_auto_resize": False}))[0]
    )
    assert one.shape == several.shape and np.array_equal(one, several)


@pytest.mark.parametrize(("strength", "steps"), [(0.0, 4), (0.2, 4), (0.01, 50)])
def test_a_strength_that_leaves_no_step_is_refused_in_words(
    folders: Callable[[str], Path], load: Callable[..., Omni], strength: float, steps: int
) -> None:
    value = DiffusionParams(num_inference_steps=steps, strength=strength, image=picture())
    (output,) = load(folders("img2img")).generate("a cat", value)
    assert f"strength: got {strength:g}, which leaves none of {steps} steps" in error(output)


def test_sounds_come_as_array_audio_path_or_pair(tmp_path: Path, load: Callable[..., Omni]) -> None:
    random_stable_audio(tmp_path / "model")
    omni = load(tmp_path / "model")
    samples = np.sin(np.linspace(0, 60, RATE // 2)).astype(np.float32)[None].repeat(2, axis=0)
    Audio(samples, RATE).save(tmp_path / "x.wav")
    stereo = torch.from_numpy(samples)[None]
    forms = [samples, Audio(samples, RATE), (samples, RATE), torch.from_numpy(samples), stereo]
    made_of = []
    for form in [*forms, str(tmp_path / "x.wav")]:
        value = DiffusionParams(seed=1, num_inference_steps=2, duration_s=0.5, extra={"initial_audio_waveforms": form})
        (output,) = omni.generate("a bell", value)
        assert output.error is None, output.error
        made_of.append(output.audios[0].samples)
    assert all(np.array_equal(made_of[0], each) for each in made_of[:5])
    assert np.abs(made_of[0] - made_of[5]).max() < 1e-2, "16 bits of a file"
    (without,) = omni.generate({"prompt": "a bell", "duration_s": 0.5}, DiffusionParams(seed=1, num_inference_steps=2))
    assert without.audios[0].samples.shape == (2, RATE // 2), "the duration may stand in the prompt"
    assert not np.array_equal(without.audios[0].samples, made_of[0])
    (twice,) = omni.generate({"prompt": "a bell", "duration_s": 0.5}, DiffusionParams(duration_s=1.0))
    assert "the parameters say it too" in error(twice)


# Two stages over one folder


def test_two_stages_over_one_folder_share_weights_and_no_state(folders: Callable[[str], Path]) -> None:
    folder = str(folders("sd"))
    pag = {"kind": "diffusers", "model": folder, "pipeline": "StableDiffusionPAGPipeline"}
    stages = {"a": pag, "b": {"kind": "diffusers", "model": folder}, "c": pag}
    params = {"a": small(1, num_inference_steps=4), "b": small(1, num_inference_steps=5), "c": small(2)}
    alone = {}
    for name, stage in stages.items():
        with Omni({"stages": {name: stage}, "outputs": [name]}, progress=False) as omni:
            (output,) = omni.generate("a cat", {name: params[name]})
            alone[name] = pixels(output)
    with Omni({"stages": stages, "outputs": list(stages)}, progress=False) as omni:
        (output,) = omni.generate("a cat", params)
    assert output.error is None, output.error
    for name, expected in alone.items():
        assert np.array_equal(np.asarray(output.results[name].images[0]), expected), name
    assert not np.array_equal(alone["a"], alone["b"])


def test_a_failure_names_its_stage_once(
    folders: Callable[[str], Path], load: Callable[..., Omni], monkeypatch: pytest.MonkeyPatch
) -> None:
    omni = load(folders("sd"))

    def broken(*arguments: Any, **rest: Any) -> Any:
        raise RuntimeError("out of paint")

    monkeypatch.setattr(diffusers.UNet2DConditionModel, "forward", broken)
    (output,) = omni.generate("a cat", small())
    assert error(output).count("stage 's'") == 1 and "out of paint" in error(output)


def test_unconditional_and_pixel_pipelines_run_too(tmp_path: Path, load: Callable[..., Omni]) -> None:
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    reference = save(made("DDPMPipeline", {"unet": model, "scheduler": diffusers.DDPMScheduler()}), tmp_path)
    (output,) = load(tmp_path).generate("", DiffusionParams(seed=2, num_inference_steps=3))
    expected = reference(num_inference_steps=3, generator=generator(2)).images[0]
    assert np.array_equal(pixels(output), np.asarray(expected))


def test_the_vae_of_a_folder_says_which_pictures_it_takes(tmp_path: Path) -> None:
    from vllm_omni.engine.diffusers.pipeline_folder import PipelineFolder

    save(stable_diffusion(vae=vae(in_channels=4, out_channels=4)), tmp_path)
    form = PipelineFolder(tmp_path).media_format()
    assert form.mode == "RGBA"
    layer = picture("RGBA", (16, 8))
    layer.putalpha(51)
    layer.save(tmp_path / "layer.png")
    for given in (layer, layer.convert("RGBa"), tmp_path / "layer.png", (tmp_path / "layer.png").read_bytes()):
        read = pipeline_inputs.read_pictures("image", given, form, LimitsConfig(), lambda: None)
        assert read.mode == "RGBA" and (np.asarray(read)[..., 3] == 51).all(), given
