"""Which pipelines of diffusers run through the adapter stage, and whether they give what plain diffusers gives.

    python tools/survey_pipelines.py                    # all of them -> docs/pipelines.md
    python tools/survey_pipelines.py FluxPipeline ...   # some of them, shown only

For every pipeline that can be made here a tiny random folder is written, and the same request goes to plain diffusers
and to a `diffusers` stage over that folder; the pictures or samples must be equal bit for bit.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support import tiny_parts as parts
from support import tiny_pipelines as tiny
from support import tiny_videos as films
from support.diffusers_folders import random_stable_audio, random_z_image

from vllm_omni import DiffusionParams, Omni, OmniOutput
from vllm_omni.engine.diffusers.call import NAMES
from vllm_omni.engine.diffusers.pipeline_class import given_kind, pipeline_class
from vllm_omni.errors import OmniError

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "pipelines.md"
SIDE = 32
SEED = 3
MAX_WORDS = 160
EQUAL, NOT_TRIED = "equal", "not tried"

sd, xl, flux = tiny.stable_diffusion, tiny.stable_diffusion_xl, tiny.flux
MAKERS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(
        (
            "StableDiffusionPipeline",
            "StableDiffusionImg2ImgPipeline",
            "StableDiffusionPAGPipeline",
            "StableDiffusionPAGImg2ImgPipeline",
            "StableDiffusionPAGInpaintPipeline",
            "StableDiffusionPanoramaPipeline",
            "StableDiffusionSAGPipeline",
            "StableDiffusionInpaintPipeline",
            "CycleDiffusionPipeline",
            "SemanticStableDiffusionPipeline",
            "StableDiffusionModelEditingPipeline",
        ),
        sd,
    ),
    **dict.fromkeys(
        (
            "StableDiffusionXLPipeline",
            "StableDiffusionXLImg2ImgPipeline",
            "StableDiffusionXLInpaintPipeline",
            "StableDiffusionXLPAGPipeline",
            "StableDiffusionXLPAGImg2ImgPipeline",
            "StableDiffusionXLPAGInpaintPipeline",
        ),
        xl,
    ),
    **dict.fromkeys(
        ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxKontextPipeline"),
        flux,
    ),
    "FluxControlPipeline": lambda kind: flux(kind, in_channels=32),
    "FluxControlImg2ImgPipeline": lambda kind: flux(kind, in_channels=32),
    "FluxFillPipeline": lambda kind: flux(kind, in_channels=48),
    "StableDiffusionInstructPix2PixPipeline": lambda kind: sd(kind, unet=parts.unet(in_channels=8)),
    "StableDiffusionXLInstructPix2PixPipeline": lambda kind: xl(kind, unet=parts.xl_unet(in_channels=8)),
    "StableDiffusionImageVariationPipeline": lambda kind: sd(
        kind, image_encoder=parts.vision(), feature_extractor=parts.image_processor()
    ),
    "LatentConsistencyModelPipeline": lambda kind: lcm(kind),
    "LatentConsistencyModelImg2ImgPipeline": lambda kind: lcm(kind),
    **{
        f"StableDiffusionControlNet{rest}Pipeline": lambda kind: sd(kind, controlnet=parts.controlnet())
        for rest in ("", "Img2Img", "Inpaint", "PAG", "PAGInpaint")
    },
    **{
        f"StableDiffusionXLControlNet{rest}Pipeline": lambda kind: xl(kind, controlnet=xl_controlnet())
        for rest in ("", "Img2Img", "Inpaint", "PAG", "PAGImg2Img")
    },
    "DDPMPipeline": lambda kind: pixel_pipeline(kind, "DDPMScheduler"),
    "DDIMPipeline": lambda kind: pixel_pipeline(kind, "DDIMScheduler"),
    "PNDMPipeline": lambda kind: pixel_pipeline(kind, "PNDMScheduler"),
    "ScoreSdeVePipeline": lambda kind: pixel_pipeline(kind, "ScoreSdeVeScheduler"),
    "KarrasVePipeline": lambda kind: pixel_pipeline(kind, "KarrasVeScheduler"),
    "ConsistencyModelPipeline": lambda kind: pixel_pipeline(kind, "CMStochasticIterativeScheduler"),
}
MAKERS |= {
    **dict.fromkeys(
        ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"), tiny.sd3
    ),
    **dict.fromkeys(("StableDiffusion3PAGPipeline", "StableDiffusion3PAGImg2ImgPipeline"), tiny.sd3),
    **dict.fromkeys(("ChromaPipeline", "ChromaImg2ImgPipeline", "ChromaInpaintPipeline"), tiny.chroma),
    **dict.fromkeys(("PixArtAlphaPipeline", "PixArtSigmaPipeline", "PixArtSigmaPAGPipeline"), tiny.pixart),
    "AuraFlowPipeline": tiny.aura_flow,
    **dict.fromkeys(("ZImageImg2ImgPipeline", "ZImageInpaintPipeline"), tiny.z_image),
    **dict.fromkeys(("IFPipeline", "IFImg2ImgPipeline", "IFInpaintingPipeline"), tiny.deep_floyd),
    "FluxControlInpaintPipeline": lambda kind: flux(kind, in_channels=32),
    "FluxKontextInpaintPipeline": flux,
    "DiTPipeline": tiny.dit,
}
MAKERS |= {
    **dict.fromkeys(("LTXPipeline", "LTXImageToVideoPipeline"), films.ltx),
    **dict.fromkeys(("AnimateDiffPipeline", "AnimateDiffPAGPipeline"), films.animate_diff),
    "CogVideoXPipeline": films.cogvideox,
}
FOLDERS: dict[str, Callable[[Path], Any]] = {
    "StableAudioPipeline": random_stable_audio,
    "ZImagePipeline": random_z_image,
}


def lcm(kind: str) -> Any:
    import diffusers

    scheduler = diffusers.LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return sd(kind, scheduler=scheduler, unet=parts.unet(time_cond_proj_dim=32))


def xl_controlnet() -> Any:
    return parts.controlnet(**parts.XL_BLOCKS)


def pixel_pipeline(kind: str, scheduler: str) -> Any:
    import diffusers

    model = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    return tiny.made(kind, {"unet": model, "scheduler": getattr(diffusers, scheduler)()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipelines", nargs="*", metavar="PIPELINE", help="names of classes; default: all")
    args = parser.parse_args()
    quiet()
    if args.pipelines:
        for name in args.pipelines:
            print(f"{name}: {outcome(name)}")
        return
    outcomes = {name: outcome(name) for name in exported()}
    PAGE.write_text(page(outcomes), encoding="utf-8")
    print(f"wrote {PAGE}")


def quiet() -> None:
    """Turns off what diffusers and transformers say while folders are written and read."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    warnings.simplefilter("ignore")
    logging.getLogger().setLevel(logging.CRITICAL)
    for each in (of_diffusers, of_transformers):
        each.set_verbosity(logging.CRITICAL)
        each.disable_progress_bar()


def exported() -> list[str]:
    """Every pipeline class that diffusers exports."""
    import diffusers

    return sorted(name for name in dir(diffusers) if name.endswith("Pipeline") and name != "DiffusionPipeline")


def outcome(name: str) -> str:
    """'equal', 'differs ...', 'refused: ...' or 'not tried ...' of one pipeline."""
    try:
        kind = given_kind(pipeline_class(name))
    except OmniError as error:
        return f"refused at load: {' '.join(str(error).split()).removeprefix('pipeline: ')}"
    if name not in MAKERS and name not in FOLDERS:
        return f"{NOT_TRIED} (gives {kind})"
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        try:
            reference = FOLDERS[name](Path(folder)) if name in FOLDERS else tiny.save(MAKERS[name](name), Path(folder))
            arguments = request(type(reference))
            expected = plain(reference, arguments, kind or "image")
        except Exception as error:  # of diffusers itself, on a folder of this tool
            return f"{NOT_TRIED} (plain diffusers: {type(error).__name__}: {str(error).splitlines()[0]:.80})"
        return compared(ours(folder, arguments), expected)


def request(pipeline_type: type) -> dict[str, Any]:
    """Arguments that the class takes, as small as can be."""
    known = inspect.signature(pipeline_type.__call__).parameters
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
    mask = Image.new("L", (SIDE, SIDE), 0)
    mask.paste(255, (8, 8, 24, 24))
    wanted = {
        "prompt": "a cat",
        "source_prompt": "a dog",
        "image": picture,
        "mask_image": mask,
        "control_image": picture,
        "height": SIDE,
        "width": SIDE,
        "num_inference_steps": 4,
        "num_frames": films.NUM_FRAMES,
        "strength": 0.75,
        "audio_end_in_s": 0.5,
        "max_area": SIDE * SIDE,
        "_auto_resize": False,
        "use_resolution_binning": False,
        "class_labels": [1],
    }
    return {name: value for name, value in wanted.items() if name in known}


def plain(pipeline: Any, arguments: Mapping[str, Any], kind: str) -> np.ndarray[Any, Any]:
    result = pipeline(**arguments, generator=torch.Generator().manual_seed(SEED))
    if kind == "video":
        return np.stack([np.asarray(frame.convert("RGB")) for frame in result.frames[0]])
    made = result.images[0] if kind == "image" else result.audios[0]
    return np.asarray(made.convert("RGB") if isinstance(made, Image.Image) else made)


def ours(folder: str, arguments: Mapping[str, Any]) -> OmniOutput | Exception:
    fields = {name: field for field, names in NAMES.items() for name in names}
    given: dict[str, Any] = {"extra": {}, "seed": SEED}
    for name, value in arguments.items():
        if name == "prompt":
            continue
        if name in fields:
            given[fields[name]] = value
        else:
            given["extra"][name] = value
    stage = {"kind": "diffusers", "model": folder}
    try:
        with Omni({"stages": {"result": stage}, "outputs": ["result"]}, progress=False) as omni:
            (output,) = omni.generate(str(arguments.get("prompt", "")), DiffusionParams(**given))
            return output
    except OmniError as error:
        return error


def compared(output: OmniOutput | Exception, expected: np.ndarray[Any, Any]) -> str:
    error = output if isinstance(output, Exception) else output.error
    if error is not None:
        return f"refused: {' '.join(str(error).split()):.{MAX_WORDS}}"
    assert isinstance(output, OmniOutput)
    if output.videos:
        got: np.ndarray[Any, Any] = output.videos[0].frames
    else:
        got = np.asarray(output.images[0]) if output.images else output.audios[0].samples
    if got.shape != expected.shape:
        return f"differs: {list(got.shape)}, plain {list(expected.shape)}"
    difference = float(np.abs(got.astype(np.float64) - expected).max())
    return EQUAL if difference == 0 else f"differs by up to {difference:g}"


def page(outcomes: Mapping[str, str]) -> str:
    """The whole of docs/pipelines.md."""
    import diffusers

    words = functools.partial(_count, list(outcomes.values()))
    rows = [f"| `{name}` | {text.replace('|', '/')} |" for name, text in outcomes.items()]
    lines = [
        "# Pipelines of diffusers",
        "",
        f"All {len(outcomes)} pipeline classes that diffusers {diffusers.__version__} exports, as a `diffusers` stage"
        f" finds them: {words(EQUAL)} give bit for bit what plain diffusers gives on a tiny random folder,"
        f" {words('refused')} are refused (text and embeddings, libraries that are not installed here),"
        f" {words('differs')} differ, {words(NOT_TRIED)} were not tried. Written by `python"
        " tools/survey_pipelines.py`.",
        "",
        "| Pipeline | Outcome |",
        "|---|---|",
        *rows,
        "",
    ]
    return "\n".join(lines)


def _count(outcomes: Sequence[str], beginning: str) -> int:
    return sum(text.startswith(beginning) for text in outcomes)


if __name__ == "__main__":
    main()
