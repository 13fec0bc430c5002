"""What diffusion models of pictures and videos check alike before a request is admitted. Knows no model: each says what
it does not read, which multiples its sizes have, and what its guidance is.
"""

from __future__ import annotations

from collections.abc import Iterable

from vllm_omni.config.schema import LimitsConfig
from vllm_omni.errors import InvalidRequestError
from vllm_omni.params import DiffusionParams
from vllm_omni.request import OmniRequest
from vllm_omni.worker.diffusion.diffusion_model import check_limit
from vllm_omni.worker.diffusion.guidance import check_guidance_interval


def check_unread(params: DiffusionParams, names: Iterable[str], model: str) -> None:
    """InvalidRequestError where one of the parameters is set that the model does not read."""
    for name in names:
        if getattr(params, name) is not None:
            raise InvalidRequestError(f"{name}: {model} does not read it; leave it unset")


def check_size(size: tuple[int, int], multiples: tuple[int, int], limits: LimitsConfig) -> None:
    """Of a picture, or the frames of a video: height and width in pixels."""
    for name, side, multiple in zip(("height", "width"), size, multiples, strict=True):
        if side % multiple:
            raise InvalidRequestError(f"{name}: got {side}, expected a multiple of {multiple}")
    check_limit("height * width", size[0] * size[1], 1, limits.max_pixels, integer=True)


def check_scale(params: DiffusionParams, scale: float, num_steps: int, limits: LimitsConfig) -> None:
    """Of guidance, whatever its formula, and the steps in which it acts."""
    check_limit("guidance_scale", scale, 0, limits.max_guidance_scale)
    check_guidance_interval(params, num_steps)


def check_negative(
    request: OmniRequest,
    params: DiffusionParams,
    scale: float,
    port: str,
    connected: frozenset[str],
    *,
    is_distilled: bool = False,
) -> None:
    """Of guidance that a scale up to 1 turns off: a negative prompt is read where it acts, and then by `port`.
    is_distilled: whether the scale cannot be raised.
    """
    if scale <= 1 and (params.negative_prompt or request.negative_prompt):
        fix = "leave it out" if is_distilled else "raise guidance_scale above 1 or leave it out"
        raise InvalidRequestError(f"negative_prompt: guidance_scale {scale:g} never reads it; {fix}")
    if scale > 1 and port not in connected:
        raise InvalidRequestError(
            f"guidance_scale: got {scale:g}, but the stage has no input {port}; add the edge, or set 1, which guides"
            " nothing"
        )
