"""What is known of an AR stage of speech before it is loaded: a thinker's states in, row by row as they are made, codes
of audio out.
"""

from __future__ import annotations

from vllm_omni.config.schema import OmniConfig, StageConfig
from vllm_omni.engine.ar.spec import ARSpec
from vllm_omni.engine.ar.talker.job import CODES
from vllm_omni.engine.ar.talker.words import checked_params, refuse_keys
from vllm_omni.engine.ar.tapped_states import POSITIONS
from vllm_omni.engine.base import EngineContext, ReadPorts
from vllm_omni.models.qwen2_5_omni.speakers import Speaker, Speakers
from vllm_omni.models.qwen2_5_omni.talker import TalkerConfig
from vllm_omni.models.qwen2_5_omni.talker_job import PORTS, PROMPT, REPLY
from vllm_omni.models.qwen2_5_omni.talker_stage import DEFAULT_MAX_TOKENS, TalkerStage
from vllm_omni.params import SamplingParams, StageParams
from vllm_omni.payload import StageSignature, TensorSpec
from vllm_omni.request import OmniRequest
from vllm_omni.utils.files import ModelFolders
from vllm_omni.worker.ar.language_model import LanguageModelFolder
from vllm_omni.worker.ar.model_runner import ModelRunner

SPEAKER = "speaker"


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
        self.speakers = Speakers.load(model.folder)
        self.request_choices = {SPEAKER: tuple(self.speakers.names)}
        states = TensorSpec(("T", 2 * self.talker.embedding_size))
        self.signature = StageSignature(
            inputs={PROMPT: states, REPLY: states, POSITIONS: TensorSpec(("T", 3))},
            outputs={CODES: TensorSpec(("T",))},
            required_inputs=PORTS,
            meta=frozenset({"finish_reason", "prompt_tokens"}),
            streamed_inputs=PORTS,
            streamed_outputs=frozenset({CODES}),
        )

    def check(self, request: OmniRequest, params: StageParams, reads: ReadPorts) -> Speaker:
        """The voice that the request names."""
        speaker = self.speakers.get(request.fields.get(SPEAKER))
        checked_params(self.ar_limits, params)
        return speaker

    def job_size(self, request: OmniRequest, params: StageParams, prepared: object) -> float:
        return float(params.max_tokens or DEFAULT_MAX_TOKENS) if isinstance(params, SamplingParams) else 0.0

    def tapped_layers(self, reads: ReadPorts) -> frozenset[int]:
        return frozenset()

    def make_stage(self, context: EngineContext, runner: ModelRunner) -> TalkerStage:
        return TalkerStage(self, context, runner)
