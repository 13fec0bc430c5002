"""The stage configs that ship with the package, and which of them fits a checkpoint. Reads no weights."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from vllm_omni.errors import ConfigError
from vllm_omni.utils.checks import did_you_mean
from vllm_omni.utils.files import assets_folder, read_json, user_path

_BY_PIPELINE = {
    "AceStepPipeline": "ace_step",
    "Flux2KleinInpaintPipeline": "flux2_klein",
    "Flux2KleinKVPipeline": "flux2_klein",
    "Flux2KleinPipeline": "flux2_klein",
    "QwenImageEditPlusPipeline": "qwen_image_edit",
    "QwenImagePipeline": "qwen_image",
    "StableAudioPipeline": "stable_audio",
    "WanPipeline": "wan",
    "ZImagePipeline": "z_image",
}
_BY_ARCHITECTURE = {
    "LlamaForCausalLM": "language_model",
    "MinistralForCausalLM": "language_model",
    "MistralForCausalLM": "language_model",
    "Qwen2ForCausalLM": "language_model",
    "Qwen2VLForConditionalGeneration": "language_model",
    "Qwen2_5_VLForConditionalGeneration": "language_model",
    "Qwen2_5OmniForConditionalGeneration": "qwen_omni",
    "Qwen2_5OmniModel": "qwen_omni",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "language_model",
    "Qwen3TTSForConditionalGeneration": "qwen3_tts",
    "Qwen3OmniMoeForConditionalGeneration": "qwen3_omni",
    "Qwen3VLForConditionalGeneration": "language_model",
}
_BY_MODEL_TYPE = {
    "llama": "language_model",
    "ministral": "language_model",
    "mistral": "language_model",
    "qwen2": "language_model",
    "qwen2_vl": "language_model",
    "qwen2_5_vl": "language_model",
    "qwen2_5_omni": "qwen_omni",
    "qwen3": "qwen3",
    "qwen3_moe": "language_model",
    "qwen3_tts": "qwen3_tts",
    "qwen3_omni_moe": "qwen3_omni",
    "qwen3_vl": "language_model",
}


_WITHOUT_SPEECH = {"qwen3_omni": "qwen3_omni_text"}  # for checkpoints that say that they have none
_ANY_OTHER_PIPELINE = "diffusers"
_HOSTED_WITH = {"wan": "boundary_ratio"}  # what the index of a pipeline says where its own config does not run it


def supported_checkpoints() -> dict[str, str]:
    """Pipeline or architecture -> name of the shipped config that runs it."""
    return {**_BY_PIPELINE, **_BY_ARCHITECTURE}


def shipped_configs() -> dict[str, Path]:
    """Name (without '.yaml') -> file, of an installed package as of a checkout."""
    package = Path(str(files("vllm_omni")))
    installed = package / "stage_configs"
    folder = installed if installed.is_dir() else package.parent / "configs" / "stages"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config(name: str | Path) -> Path:
    """A file that exists, else the shipped config of that name (with or without '.yaml')."""
    path = user_path("config", name, raises=ConfigError)
    if path.is_file():
        return path
    shipped = shipped_configs()
    if str(name).removesuffix(".yaml") in shipped:
        return shipped[str(name).removesuffix(".yaml")]
    raise ConfigError(
        f"config: got {str(name)!r}, which is no file and no shipped config{did_you_mean(path.stem, shipped)}"
    )


def config_for_model(folder: str | Path) -> Path:
    """The shipped config for a local checkpoint folder: an asset's own, else by its model_index.json (diffusers) or
    config.json. A pipeline without one of its own is hosted as it is.
    """
    folder = Path(folder)
    own = _config_of_asset(folder)
    if own is not None:
        return own
    index, config = folder / "model_index.json", folder / "config.json"
    name, got = None, "neither model_index.json nor config.json"
    if index.is_file():
        content = read_json(index)
        pipeline = content.get("_class_name")
        name, got = _lookup(_BY_PIPELINE, pipeline), f"the pipeline {pipeline!r}"
        is_hosted = name in _HOSTED_WITH and content.get(_HOSTED_WITH[name]) is not None
        if (name is None or is_hosted) and isinstance(pipeline, str):
            name = _ANY_OTHER_PIPELINE  # whose stage refuses what diffusers does not know
    elif config.is_file():
        content = read_json(config)
        architectures, model_type = content.get("architectures"), content.get("model_type")
        named = architectures if isinstance(architectures, list) else []
        first = next((name for name in named if _lookup(_BY_ARCHITECTURE, name)), named[0] if named else None)
        name = _lookup(_BY_ARCHITECTURE, first) if first is not None else _lookup(_BY_MODEL_TYPE, model_type)
        if name is not None and content.get("enable_audio_output") is False:
            name = _WITHOUT_SPEECH.get(name, name)
        got = f"the architecture {first!r} (model type {model_type!r})"
    if name is None:
        supported = ", ".join(sorted(supported_checkpoints()))
        raise ConfigError(f"{folder}: got {got}, expected one of {supported}; for anything else write a stage config")
    return shipped_configs()[name]


def _config_of_asset(folder: Path) -> Path | None:
    """The config that ships with a model that ships: its sizes and its ways are not those of the large ones."""
    if folder.resolve().parent != assets_folder().resolve():
        return None
    return shipped_configs().get(folder.name.replace("-", "_"))


def _lookup(table: dict[str, str], name: object) -> str | None:
    return table.get(name) if isinstance(name, str) else None
