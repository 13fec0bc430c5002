"""What every body has in common, and the fields that become parameters of stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_omni.errors import InvalidRequestError
from vllm_omni.lora import MAX_LORAS, MAX_SCALE, LoRA
from vllm_omni.params import MAX_SEED, DiffusionParams, SamplingParams

MAX_TEXT = 10_000_000
Label = Annotated[str, Field(max_length=512)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
GuidanceInterval = Annotated[list[float], Field(min_length=2, max_length=2, description="shares of the steps, 0 to 1")]


class Fields(BaseModel):
    """null is as if the field were not there; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())
    # fields that we have not, with the values that ask for nothing we do not do anyway
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {
            key: value
            for key, value in data.items()
            if value is not None and not (key in cls.neutral and value in cls.neutral[key])
        }


class Body(Fields):
    """What every body may say."""

    model: Label | None = None
    user: Label | None = Field(None, description="a label of the caller's; changes nothing")
    safety_identifier: Label | None = Field(None, description="a label of the caller's; changes nothing")
    timeout: float | None = Field(None, gt=0, description="seconds from now to the deadline")
    priority: Label | None = Field(None, description="one of the config's `scheduler.priority_weights`")


class LoRAField(Fields):
    """One adapter, by its name alone: a path would be anybody's file."""

    name: Label
    scale: float = Field(1.0, ge=-MAX_SCALE, le=MAX_SCALE)
    int_id: int | None = Field(None, description="a label of the caller's; changes nothing")


class LoRAFields(Body):
    """Which adapters act; see LoRA."""

    lora: Annotated[list[LoRAField], Field(max_length=MAX_LORAS)] | LoRAField | None = Field(
        None, description="adapters of the stage's `lora.folders` that act together"
    )

    def loras(self) -> list[LoRA] | None:
        if self.lora is None:
            return None
        given = self.lora if isinstance(self.lora, list) else [self.lora]
        return [LoRA(each.name, scale=each.scale) for each in given]


class SamplingFields(LoRAFields):
    """How a language model samples; see SamplingParams."""

    n: int | None = Field(None, ge=1, le=128)
    seed: Seed | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 or -1: off")
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-100, le=100)
    frequency_penalty: float | None = Field(None, ge=-100, le=100)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    logit_bias: dict[str, float] | None = Field(None, max_length=10_000)
    stop: str | Annotated[list[str], Field(max_length=64)] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=1_000)] | None = None
    min_tokens: int | None = Field(None, ge=0)
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None

    def sampling(self, **more: Any) -> SamplingParams:
        """more: what is called otherwise from route to route (max_tokens, logprobs)."""
        names = ("n", "seed", "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty")
        same = {name: getattr(self, name) for name in (*names, *_VLLM_NAMES)}
        bias = None if self.logit_bias is None else {_token_id(key): value for key, value in self.logit_bias.items()}
        top_k = 0 if self.top_k == -1 else self.top_k
        stop = self.stop if self.stop else None
        return SamplingParams(**same, top_k=top_k, logit_bias=bias, stop=stop, lora=self.loras(), **more)


class DiffusionFields(LoRAFields):
    """How a diffusion model denoises; see DiffusionParams."""

    seed: Seed | None = None
    size: Annotated[str, Field(max_length=32)] | None = Field(None, description="WIDTHxHEIGHT in pixels, or auto")
    width: int | None = Field(None, ge=1)
    height: int | None = Field(None, ge=1)
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, ge=0)
    guidance_interval: GuidanceInterval | None = None
    negative_prompt: Annotated[str, Field(max_length=MAX_TEXT)] | None = None
    strength: float | None = Field(None, ge=0, le=1)
    extra_params: dict[str, Any] | None = Field(
        None, max_length=1_000, description="what this model alone knows: keys of a prompt, or of DiffusionParams.extra"
    )


_VLLM_NAMES = ("repetition_penalty", "stop_token_ids", "min_tokens", "ignore_eos", "skip_special_tokens")


def _token_id(key: str) -> int:
    try:
        return int(key)
    except ValueError:
        raise InvalidRequestError(f"logit_bias: got the key {key!r:.40}, expected a token id") from None


def diffusion(fields: DiffusionFields, **more: Any) -> DiffusionParams:
    """The parameters of a stage that draws or sounds; `extra_params` are the graph's to sort."""
    width, height = size_of(fields.size)
    if fields.size is not None and width is not None and (fields.width or fields.height):
        raise InvalidRequestError("size: given together with width or height; keep one of them")
    return DiffusionParams(
        seed=fields.seed,
        width=width or fields.width,
        height=height or fields.height,
        num_inference_steps=fields.num_inference_steps,
        guidance_scale=fields.guidance_scale,
        guidance_interval=fields.guidance_interval,
        negative_prompt=fields.negative_prompt,
        strength=fields.strength,
        lora=fields.loras(),
        **more,
    )


def size_of(size: str | None) -> tuple[int | None, int | None]:
    """(width, height) of '512x768'; (None, None) for auto, the model's own."""
    if size is None or size == "auto":
        return None, None
    width, cross, height = size.lower().partition("x")
    if not cross or not (width.isascii() and width.isdigit() and height.isascii() and height.isdigit()):
        raise InvalidRequestError(f"size: got {size!r:.40}, expected WIDTHxHEIGHT such as 512x768, or auto")
    if len(width) > 6 or len(height) > 6 or not int(width) or not int(height):
        raise InvalidRequestError(f"size: got {size!r:.40}, expected 1 to 999999 pixels a side")
    return int(width), int(height)
