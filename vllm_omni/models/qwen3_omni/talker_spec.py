"""What is known of an AR stage of speech before it is loaded: a thinker's states in, row by row as they are made,
frames of codes out.
"""

from __future__ import annotations

import dataclasses

from vllm_omni.config.schema import OmniConfig, StageConfig
from vllm_omni.engine.ar.spec import ARSpec
from vllm_omni.engine.ar.talker.job import CODES
from vllm_omni.engine.ar.talker.words import checked_params, refuse_keys
from vllm_omni.engine.ar.tapped_states import POSITIONS, TOKENS
from vllm_omni.engine.base import EngineContext, MemoryPlan, ReadPorts
from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.models.qwen3_omni.talker_config import TalkerConfig
from vllm_omni.models.qwen3_omni.talker_job import PORTS, PROMPT, REPLY
from vllm_omni.models.qwen3_omni.talker_stage import DEFAULT_MAX_TOKENS, TalkerStage
from vllm_omni.params import SamplingParams, StageParams
from vllm_omni.payload import StageSignature, TensorSpec
from vllm_omni.request import OmniRequest
from vllm_omni.utils.checks import did_you_mean
from vllm_omni.utils.device import is_cuda, resolve_device
from vllm_omni.utils.files import ModelFolders
from vllm_omni.worker.ar.frames.frame_writer import cache_bytes
from vllm_omni.worker.ar.language_model import LanguageModelFolder
from vllm_omni.worker.ar.model_runner import ModelRunner

SPEAKER = "speaker"
DEFAULT_SPEAKER = "ethan"


class TalkerSpec(ARSpec):
    """Codes follow a reply as it is written. Nothing of it can serve another request: no prefix is cached."""

    can_write = True
    prefix_caching = False
    request_keys = frozenset({SPEAKER})

    def __init__(
        self, stage: StageConfig, config: OmniConfig, folders: ModelFolders, model: LanguageModelFolder
    ) -> None:
        super().__init__(stage, config, folders, model)
        assert isinstance(model.config, TalkerConfig)
        refuse_keys(self.options)
        self.talker = model.config
        self._check_taps(config)
        self.request_choices = {SPEAKER: tuple(self.talker.speakers)}
        width = self.talker.thinker_size
        self.signature = StageSignature(
            inputs={
                PROMPT: TensorSpec(("T", 2 * width)),
                REPLY: TensorSpec(("T", width)),
                POSITIONS: TensorSpec(("T", 3)),
                TOKENS: TensorSpec(("T",)),
            },
            outputs={CODES: TensorSpec(("T", self.talker.num_codes))},
            required_inputs=PORTS,
            meta=frozenset({"finish_reason", "prompt_tokens"}),
            streamed_inputs=PORTS,
            streamed_outputs=frozenset({CODES}),
        )

    def check(self, request: OmniRequest, params: StageParams, reads: ReadPorts) -> str:
        """The voice that the request names."""
        checked_params(self.ar_limits, params)
        speakers = self.talker.speakers
        name = request.fields.get(SPEAKER)
        if name is None:
            return DEFAULT_SPEAKER if DEFAULT_SPEAKER in speakers else next(iter(speakers))
        if not isinstance(name, str) or name.lower() not in speakers:
            raise InvalidRequestError(f"{SPEAKER}: got {name!r:.80}{did_you_mean(str(name)[:80], list(speakers))}")
        return name.lower()

    def job_size(self, request: OmniRequest, params: StageParams, prepared: object) -> float:
        return float(params.max_tokens or DEFAULT_MAX_TOKENS) if isinstance(params, SamplingParams) else 0.0

    def plan_memory(self) -> MemoryPlan:
        """With the code predictor's own cache."""
        plan, own = super().plan_memory(), cache_bytes(self.talker.predictor, self.options.max_num_seqs, self._itemsize)
        return dataclasses.replace(plan, activation_bytes=plan.activation_bytes + own)

    @property
    def uses_graphs(self) -> bool:
        """The code predictor has no experts: its part of a step can be captured where the rest cannot."""
        is_asked = self.options.cuda_graphs is not False and not self.offloads
        return is_asked and is_cuda(resolve_device(self.stage.device))

    def tapped_layers(self, reads: ReadPorts) -> frozenset[int]:
        return frozenset()

    def make_stage(self, context: EngineContext, runner: ModelRunner) -> TalkerStage:
        return TalkerStage(self, context, runner)

    def note(self) -> str:
        """Besides: the voices it speaks in."""
        captured = ", frames in CUDA graphs" if self.uses_graphs else ""
        return f"{super().note()}{captured}; {SPEAKER} {', '.join(self.talker.speakers)}"

    def _check_taps(self, config: OmniConfig) -> None:
        """ConfigError for states of other layers than the checkpoint was trained on: they would have the same width."""
        for port, expected in ((PROMPT, (0, self.talker.thinker_layer)), (REPLY, (0,))):
            edge = self.stage.edges.get(port)
            source = None if edge is None else config.stages.get(edge.stage)
            taps = {} if source is None else getattr(source.options, "outputs", {})
            tap = None if edge is None else taps.get(edge.source.partition(".")[2])
            if tap is not None and tuple(tap.layers) != expected:
                raise ConfigError(
                    f"inputs.{port}: got the layers {list(tap.layers)} of {edge.source if edge else port}, expected "
                    f"{list(expected)}: embeddings, and the layer that the checkpoint names (accept_hidden_layer)"
                )
