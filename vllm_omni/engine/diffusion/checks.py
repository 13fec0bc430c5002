"""What every stage that takes DiffusionParams checks in the same way."""

from __future__ import annotations

import dataclasses

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.core.diffusion.caches.base import Fit
from vllm_omni.engine.base import ReadPorts
from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.params import VIDEO_FIELDS, DiffusionParams, StageParams
from vllm_omni.request import OmniRequest
from vllm_omni.worker.diffusion.diffusion_model import check_limit

PARAM_KEYS = frozenset({"duration_s", "image", "mask", "strength"})  # that a prompt's dict may hold, too


def diffusion_params(params: StageParams) -> DiffusionParams:
    """The same, InvalidRequestError for the parameters of another kind of stage."""
    if not isinstance(params, DiffusionParams):
        raise InvalidRequestError(f"params: got {type(params).__name__}, expected DiffusionParams")
    return params


def with_fields(
    request: OmniRequest, params: DiffusionParams, given: DiffusionParams, keys: frozenset[str]
) -> DiffusionParams:
    """The parameters with what the prompt's dict says of these `keys` beside them, which stands above defaults. given:
    those of the request, without defaults. InvalidRequestError for what both say.
    """
    said = {key: request.fields[key] for key in sorted(keys & PARAM_KEYS) if request.fields.get(key) is not None}
    for key in said:
        if getattr(given, key) is not None:
            raise InvalidRequestError(f"prompt[{key!r}]: the parameters say it too; give it once")
    return dataclasses.replace(params, **said) if said else params


def check_counts(params: DiffusionParams, num_steps: int, limits: LimitsConfig) -> None:
    """Steps and outputs against the limits; `sigmas` and `num_inference_steps` must not contradict each other."""
    check_limit("num_inference_steps", num_steps, 1, limits.max_inference_steps, integer=True)
    check_limit("num_outputs", params.num_outputs or 1, 1, limits.max_outputs, integer=True)
    if params.sigmas is not None and params.num_inference_steps not in (None, len(params.sigmas)):
        raise InvalidRequestError(
            f"sigmas: got {len(params.sigmas)} of them and num_inference_steps {params.num_inference_steps};"
            " leave one of the two out"
        )


def check_no_video(params: DiffusionParams) -> None:
    """InvalidRequestError for what only a stage reads that makes videos."""
    for name in VIDEO_FIELDS:
        if getattr(params, name) is not None:
            raise InvalidRequestError(
                f"{name}: got {getattr(params, name)}, but this stage makes no video; leave it unset"
            )


def check_previews(params: DiffusionParams, gives_previews: bool) -> None:
    """InvalidRequestError where running samples are to be shown and cannot be."""
    if params.num_previews and not gives_previews:
        raise InvalidRequestError(
            f"num_previews: got {params.num_previews}, expected 0: what this stage makes cannot be shown before it is"
            " done; leave it out"
        )


def check_readers(params: DiffusionParams, stage: str, reads: ReadPorts) -> None:
    """What is asked for must have a reader, and a result that is handed on while it is made must be one."""
    if params.output_type == "latent" and "latents" not in reads.whole:
        raise InvalidRequestError(
            f"output_type: got 'latent', but nobody reads the latents; list '{stage}.latents' in the config's outputs"
        )
    if reads.streamed and (params.num_outputs or 1) > 1:
        raise InvalidRequestError(
            f"num_outputs: got {params.num_outputs}, expected 1 where the result is handed on while it is made"
        )


def check_fitted_steps(fit: Fit | None, num_steps: int) -> None:
    """InvalidRequestError for a number of steps that the step cache's numbers say nothing about."""
    if fit is not None and fit.num_steps not in (None, num_steps):
        raise InvalidRequestError(
            f"num_inference_steps: got {num_steps}, expected {fit.num_steps}, as this stage's step cache was fitted on;"
            " ask for as many, or run `vllm-omni calibrate` with --steps"
        )


def check_fitted_model(fit: Fit, model: str, where: str) -> None:
    """ConfigError where the step cache's numbers are another model's. model: its fingerprint. where: its folder."""
    if fit.model != model:
        raise ConfigError(
            f"cache.fitted_on: got {fit.model!r}, but {where} is {model!r}: the numbers of this step cache belong to"
            " another model; `vllm-omni calibrate` fits them to this one"
        )
