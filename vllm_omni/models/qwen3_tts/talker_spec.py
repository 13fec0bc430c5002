"""What is known of the talker's stage before it is loaded: text in, frames of codes out."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from torch import Tensor

from vllm_omni.config.schema import OmniConfig, StageConfig, VoicesConfig
from vllm_omni.engine.ar.generation_defaults import FILE, generation_defaults
from vllm_omni.engine.ar.spec import ARSpec
from vllm_omni.engine.ar.talker.job import CODES
from vllm_omni.engine.ar.talker.words import checked_params, refuse_keys
from vllm_omni.engine.ar.tokenizer import TextProcessor, find_tokenizer
from vllm_omni.engine.base import EngineContext, MemoryPlan, ReadPorts, model_folder
from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.models.qwen3_tts.cloned_voice import VoiceCloner
from vllm_omni.models.qwen3_tts.config import TalkerConfig
from vllm_omni.models.qwen3_tts.options import TalkerOptions
from vllm_omni.models.qwen3_tts.prompt import num_rows
from vllm_omni.models.qwen3_tts.request import AUTO, KEYS, LANGUAGE, REF_AUDIO, VOICE, SpeechReader, SpeechRequest
from vllm_omni.models.qwen3_tts.sampling import FIRST_CODES, PUBLISHED, subtalker_settings
from vllm_omni.models.qwen3_tts.talker_job import REFERENCE, TEXT
from vllm_omni.models.qwen3_tts.talker_stage import TalkerStage
from vllm_omni.models.qwen3_tts.turn_reader import TurnReader
from vllm_omni.params import SamplingParams, StageParams
from vllm_omni.payload import StageSignature, TensorSpec
from vllm_omni.request import OmniRequest
from vllm_omni.utils.files import ModelFolders
from vllm_omni.voices import VoiceStore
from vllm_omni.worker.ar.frames.frame_writer import cache_bytes
from vllm_omni.worker.ar.language_model import LanguageModelFolder
from vllm_omni.worker.ar.model_runner import ModelRunner

PART = "talker"
FRAMES_PER_S = 12.5
READ_KEYS = ("tokenizer", "generation_config")  # of those about words


class TalkerSpec(ARSpec):
    """One text is one speech."""

    options: TalkerOptions

    options_type = TalkerOptions
    can_write = True

    def __init__(
        self, stage: StageConfig, config: OmniConfig, folders: ModelFolders, model: LanguageModelFolder
    ) -> None:
        super().__init__(stage, config, folders, model)
        assert isinstance(model.config, TalkerConfig)
        refuse_keys(self.options, READ_KEYS)
        self.talker = model.config
        self.prefix_caching = self.options.prefix_caching
        reads_file = self.options.generation_config == "read"
        self.defaults = {**(generation_defaults(model.folder) if reads_file else {}), **stage.defaults}
        self._draw = subtalker_settings(model.folder) if reads_file else PUBLISHED
        self._tokenizer_folder = self._find_tokenizer(folders)
        self._lock = threading.Lock()
        self.request_keys = KEYS
        self.media_keys = frozenset({REF_AUDIO})
        self.voices = self._kept_voices()
        self.request_choices = {LANGUAGE: (AUTO, *self.talker.spoken_languages)}
        if self.talker.speakers or self.voices is not None:
            self.request_choices = {**self.request_choices, VOICE: tuple(self.talker.speakers)}
        self.signature = StageSignature(
            outputs=dict.fromkeys((CODES, REFERENCE), TensorSpec(("T", self.talker.num_codes))),
            meta=frozenset({"finish_reason", "prompt_tokens"}),
            text_inputs={TEXT: TensorSpec(("T",))},
            streamed_outputs=frozenset({CODES, REFERENCE}),
        )

    @classmethod
    def describe(cls, stage: StageConfig, config: OmniConfig, folders: ModelFolders) -> TalkerSpec:
        options: TalkerOptions = stage.options
        folder = model_folder(stage, folders, "the folder of a Qwen3-TTS checkpoint")
        model = LanguageModelFolder.open(folder, PART, options.rope_scaling, stage.variant)
        described = cls(stage, config, folders, model)
        described.check_capture()
        return described

    def check(self, request: OmniRequest, params: StageParams, reads: ReadPorts) -> SpeechRequest:
        """What is to be said, in tokens that fit; the recording's headers alone have been read."""
        checked_params(self.ar_limits, params)
        speech = self._reader.read(request)
        num_frames = math.ceil(speech.recording_s * FRAMES_PER_S) if speech.script.reference else 0
        count = num_rows(speech.script, self.talker, num_frames)
        if count >= self.model_len:
            raise InvalidRequestError(
                f"prompt: got {count} tokens, expected fewer than {self.model_len} (max_model_len); shorten it"
            )
        self.ar_limits.check_pool(count + 1)
        return speech

    def open_text(self, request: OmniRequest, prepared: object) -> Callable[[str, bool], Tensor]:
        return TurnReader(self._encode, self.limits).read

    def draws(self, params: StageParams) -> bool:
        """Whether the other codes of a frame are drawn, the request says, too."""
        return True

    def job_size(self, request: OmniRequest, params: StageParams, prepared: object) -> float:
        """In frames: a text token is about one of them to say, unless fewer are asked for."""
        assert isinstance(prepared, SpeechRequest) and isinstance(params, SamplingParams)
        most = prepared.max_tokens or params.max_tokens or FIRST_CODES["max_tokens"]
        words = prepared.script.words
        return float(most if prepared.script.is_open else min(4 * len(words), most))

    def plan_memory(self) -> MemoryPlan:
        """With the code predictor's own cache, and the encoders of a checkpoint that clones."""
        plan, own = super().plan_memory(), cache_bytes(self.talker.predictor, self.options.max_num_seqs, self._itemsize)
        variant = self.model.weights_variant
        encoders = VoiceCloner.weights_bytes(self.model.folder, variant) if self.talker.clones else 0
        return dataclasses.replace(
            plan, weights_bytes=plan.weights_bytes + encoders, activation_bytes=plan.activation_bytes + own
        )

    def tapped_layers(self, reads: ReadPorts) -> frozenset[int]:
        return frozenset()

    def make_stage(self, context: EngineContext, runner: ModelRunner) -> TalkerStage:
        cloner = None
        if self.talker.clones:
            cloner = VoiceCloner.load(self.model.folder, context.device, self.model.weights_variant)
        _ = self._reader  # its tokenizer, now: the folder may go while the stage runs
        return TalkerStage(self, context, runner, cloner)

    def note(self) -> str:
        """Besides: for what the checkpoint is, and in which voices it speaks."""
        said = [self.talker.task_type.replace("_", " ")]
        said += [f"{VOICE} {', '.join(self.talker.speakers)}"] if self.talker.speakers else []
        said += [f"{len(self.voices.names())} kept voices"] if self.voices is not None else []
        said.append(f"{LANGUAGE} {', '.join((AUTO, *self.talker.spoken_languages))}")
        said += [f"{name} {value} ({FILE})" for name, value in self.defaults.items() if name not in self.stage.defaults]
        return "; ".join([super().note(), *said])

    def warm_up(self) -> None:
        with self._lock:
            _ = self._encode

    @property
    def _reader(self) -> SpeechReader:
        with self._lock:
            return self._made_reader

    @cached_property
    def _made_reader(self) -> SpeechReader:
        """The tokenizer is loaded when it is first needed."""
        return SpeechReader(self.talker, self.limits, self._encode, self._draw, self.voices)

    @cached_property
    def _encode(self) -> Callable[[str], list[int]]:
        return TextProcessor(self._tokenizer_folder, chat_template=False).encode

    def _kept_voices(self) -> VoiceStore | None:
        config: VoicesConfig | None = self.options.voices
        if config is None:
            return None
        if not self.talker.clones:
            raise ConfigError(
                f"voices: got some, but this checkpoint ({self.talker.task_type}) clones no voice; remove the key"
            )
        return VoiceStore(config)

    def _find_tokenizer(self, folders: ModelFolders) -> Path:
        named = self.options.tokenizer
        configured = None if named is None else folders.resolve(named, self.stage.revision)
        found = find_tokenizer(self.model.folder, configured)
        if found is None:
            raise ConfigError(
                f"tokenizer: found none in {self.model.folder}; complete the folder, or set the stage's `tokenizer`"
            )
        return found
