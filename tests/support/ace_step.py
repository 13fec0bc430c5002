"""Small random ACE-Step folders in the published format, engines over them, and requests with the reference's words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AceStepPipeline,
    AceStepTransformer1DModel,
    AutoencoderOobleck,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.pipelines.ace_step import (
    AceStepAudioTokenDetokenizer,
    AceStepAudioTokenizer,
    AceStepConditionEncoder,
)
from diffusers.pipelines.ace_step.pipeline_ace_step import TASK_INSTRUCTIONS
from support.ar import make_tokenizer
from torch import Tensor
from transformers import Qwen3Config, Qwen3Model

from vllm_omni.config.schema import DiTCacheConfig, OmniConfig, StageConfig
from vllm_omni.engine.base import Activity, EngineContext, ReadPorts
from vllm_omni.engine.diffusion.engine import DiffusionEngine
from vllm_omni.engine.diffusion.options import DiTOptions
from vllm_omni.engine.diffusion.spec import DiffusionSpec
from vllm_omni.messages import StageDone, StageEvent, StageTask
from vllm_omni.models.ace_step.geometry import MusicGeometry
from vllm_omni.models.ace_step.request import MusicOutline
from vllm_omni.params import DiffusionParams
from vllm_omni.request import OmniRequest
from vllm_omni.utils.files import ModelFolders
from vllm_omni.worker.background import Background
from vllm_omni.worker.model_pool import ModelPool

CHANNELS = 8  # of the latents
TEXT_WIDTH = 40  # of the condition encoder
WORD_WIDTH = 32  # of the text encoder
SAMPLE_RATE = 1600
HOP = 64
READS = ReadPorts(frozenset({"audio", "latents"}))
DIT_CACHE = DiTCacheConfig(max_memory_mb=64.0)
GEOMETRY = MusicGeometry(SAMPLE_RATE, channels=2, hop=HOP, frames_per_code=5)
PORTS = (
    "prompt_embeds",
    "lyric_embeds",
    "plain_prompt_embeds",
    "music",
    "source_audio",
    "reference_audio",
    "audio_codes",
)


def random_transformer(seed: int = 0, **overrides: Any) -> AceStepTransformer1DModel:
    """Weights wide enough that every part matters."""
    torch.manual_seed(seed)
    config: dict[str, Any] = dict(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        in_channels=3 * CHANNELS,
        audio_acoustic_hidden_dim=CHANNELS,
        patch_size=2,
        sliding_window=5,
        encoder_hidden_size=TEXT_WIDTH,
        is_turbo=False,
    )
    return shaken(AceStepTransformer1DModel(**{**config, **overrides}))


def random_vae(strides: list[int], **overrides: Any) -> AutoencoderOobleck:
    """Loud enough that every layer of it is heard."""
    torch.manual_seed(1)
    config: dict[str, Any] = dict(
        encoder_hidden_size=2 * CHANNELS,
        downsampling_ratios=strides,
        channel_multiples=[1, 2, 2, 3][: len(strides)],
        decoder_channels=2 * CHANNELS,
        decoder_input_channels=CHANNELS,
        audio_channels=2,
        sampling_rate=SAMPLE_RATE,
    )
    return shaken(AutoencoderOobleck(**{**config, **overrides}))


def random_conditioning() -> dict[str, Any]:
    """Condition encoder, audio tokenizer and detokenizer."""
    torch.manual_seed(2)
    common: dict[str, Any] = dict(
        hidden_size=TEXT_WIDTH,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=5,
    )
    encoder = AceStepConditionEncoder(
        **common,
        text_hidden_dim=WORD_WIDTH,
        timbre_hidden_dim=CHANNELS,
        num_lyric_encoder_hidden_layers=2,
        num_timbre_encoder_hidden_layers=2,
    )
    encoder.silence_latent.normal_()
    coder = dict(common, audio_acoustic_hidden_dim=CHANNELS, num_attention_pooler_hidden_layers=1)
    return {
        "condition_encoder": shaken(encoder),
        "audio_tokenizer": shaken(AceStepAudioTokenizer(**coder, fsq_dim=TEXT_WIDTH), 0.3),
        "audio_token_detokenizer": shaken(AceStepAudioTokenDetokenizer(**coder), 0.3),
    }


def shaken(module: Any, scale: float = 0.08) -> Any:
    """Every parameter random; norms around one, the lengths of normed weights so that no layer fades or explodes."""
    for name, parameter in module.named_parameters():
        center = 0.7 if name.endswith("weight_g") else float("norm" in name and name.endswith("weight"))
        torch.nn.init.normal_(parameter, center, scale)
    return module.eval().requires_grad_(False)


def random_pipeline(folder: Path, parts: Mapping[str, Any] | None = None, **transformer: Any) -> AceStepPipeline:
    """A pipeline with all its parts, saved into `folder`."""
    torch.manual_seed(3)
    words = Qwen3Config(
        vocab_size=320,
        hidden_size=WORD_WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.2,
    )
    pipeline = AceStepPipeline(
        vae=random_vae([2, 4, 8]),
        text_encoder=Qwen3Model(words).eval().requires_grad_(False),
        tokenizer=make_tokenizer(),
        transformer=random_transformer(**transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
        **{**random_conditioning(), **(parts or {})},
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline


def sound(seconds: float, seed: int) -> Tensor:
    """[2, n] at SAMPLE_RATE."""
    return 0.3 * torch.randn(2, round(seconds * SAMPLE_RATE), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Case:
    """One request, for both sides. fields: request keys as ours names them."""

    name: str
    duration_s: float = 1.0
    fields: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def expected(self, pipeline: AceStepPipeline) -> Tensor:
        """[channels, n] of the reference."""
        renamed = {"audio": "src_audio"}
        params = {k: v for k, v in self.params.items() if k not in ("extra", "sigmas")}
        torch.manual_seed(self.seed + 1)  # what it draws from the posteriors, it draws from the global generator
        return pipeline(
            prompt="slow bells",
            audio_duration=self.duration_s,
            generator=torch.Generator().manual_seed(self.seed),
            timesteps=self.params.get("sigmas"),
            **{renamed.get(key, key): value for key, value in self.fields.items()},
            **params,
            **{key: value for key, value in self.params.get("extra", {}).items() if key != "normalize"},
        ).audios[0]

    def task(self, pipeline: AceStepPipeline) -> StageTask:
        params = DiffusionParams(seed=self.seed, **self.params)
        request = OmniRequest(prompt="slow bells", request_id=self.name, fields=self.fields)
        return StageTask(request, "music", params, self.inputs(pipeline))

    def outline(self, task_type: str) -> MusicOutline:
        """What the stage before would have decided; the request may contradict itself, which only it would refuse."""
        fields, frames = self.fields, None
        if task_type == "repaint":
            start, end = fields.get("repainting_start", 0.0), fields.get("repainting_end")
            frames = GEOMETRY.frame_at(start), None if end is None else GEOMETRY.frame_at(end)
        return MusicOutline(
            task_type=task_type,
            duration_s=self.duration_s,
            num_frames=GEOMETRY.num_frames(self.duration_s),
            cover_strength=fields.get("audio_cover_strength", 1.0),
            repaint_frames=frames,
            has_source_audio="audio" in fields,
            has_reference_audio="reference_audio" in fields,
            has_audio_codes="audio_codes" in fields,
        )

    def inputs(self, pipeline: AceStepPipeline) -> dict[str, Any]:
        """What the stages before would give, words encoded by the reference."""
        fields = self.fields
        task = fields.get("task_type", "text2music")
        task = "cover" if "audio_codes" in fields and task == "text2music" else task
        prompt, lyrics = self._words(pipeline, task)
        inputs = {
            "prompt_embeds": prompt,
            "lyric_embeds": lyrics,
            "audio_codes": fields.get("audio_codes", ""),
            "music": self.outline(task).to_json(),
        }
        if fields.get("audio_cover_strength", 1.0) < 1:
            inputs["plain_prompt_embeds"] = self._words(pipeline, "text2music")[0]
        inputs |= {
            port: fields[key] for key, port in (("audio", "source_audio"), ("reference_audio",) * 2) if key in fields
        }
        return inputs

    @torch.no_grad()
    def _words(self, pipeline: AceStepPipeline, task: str) -> tuple[Tensor, Tensor]:
        instruction = TASK_INSTRUCTIONS[task]
        lyrics = self.fields.get("lyrics", "")
        facts = dict(audio_duration=self.duration_s, instruction=instruction)
        words = pipeline.encode_prompt("slow bells", lyrics, torch.device("cpu"), **facts)
        return words[0][0], words[2][0]


def spec(
    folder: Path,
    *,
    policy: str = "none",
    threshold: float | None = None,
    cache: Mapping[str, Any] | None = None,
    ports: tuple[str, ...] = PORTS,
    **options: Any,
) -> DiffusionSpec:
    keys = {"policy": policy} if threshold is None else {"policy": policy, "threshold": threshold}
    stage = StageConfig(
        name="music",
        kind="dit",
        model=str(folder),
        inputs={port: f"prompt.{port}" for port in ports},
        options=DiTOptions(cache=keys if cache is None else cache, **options),
    )
    return DiffusionSpec(stage, OmniConfig(dit_cache=DIT_CACHE), ModelFolders())


def engine(folder: Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> DiffusionEngine:
    """options: those of `spec`."""
    context = EngineContext(torch.device("cpu"), dtype, ModelPool(), Background(), READS, dit_cache=DIT_CACHE)
    return spec(folder, **options).load(context)


def run(stage: DiffusionEngine) -> dict[str, StageEvent]:
    """Steps until there is no work; the last event of each request. Integrity is checked after every step."""
    last: dict[str, StageEvent] = {}
    while stage.activity() is Activity.BUSY:
        for event in stage.step():
            assert not isinstance(last.get(event.request_id), StageDone), "an event after the final one"
            last[event.request_id] = event
        stage.check_integrity()
    return last


def sounds(events: dict[str, StageEvent]) -> dict[str, Tensor]:
    """[N, channels, n] float32 by request."""
    done = {key: event for key, event in events.items() if isinstance(event, StageDone)}
    assert done.keys() == events.keys(), events
    return {key: event.payload.tensors["audio"] for key, event in done.items()}
