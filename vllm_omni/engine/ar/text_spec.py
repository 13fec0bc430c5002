"""What is known of an AR stage over words before it is loaded: a prompt in, text and hidden states out."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from functools import cached_property
from hashlib import sha256
from typing import Any

from vllm_omni.config.schema import LoRAConfig, OmniConfig, StageConfig
from vllm_omni.engine.ar.generation_defaults import FILE, generation_defaults
from vllm_omni.engine.ar.no_tokenizer import NoTokenizer
from vllm_omni.engine.ar.prompt import ARInput, PlannedPrompt, Prepared, PreparedPrompt, prompt_keys, read_prompt
from vllm_omni.engine.ar.prompt_prefixes import prefix_hashes
from vllm_omni.engine.ar.prompt_rows import check_prompt_rows, describe_prompt_rows
from vllm_omni.engine.ar.source_images import IMAGE, source_images
from vllm_omni.engine.ar.spec import ARSpec
from vllm_omni.engine.ar.tapped_states import POSITIONS, PROMPT_FACTS, TOKENS
from vllm_omni.engine.ar.text_stage import TextStage
from vllm_omni.engine.ar.tokenizer import TextProcessor, find_tokenizer
from vllm_omni.engine.base import EngineContext, ReadPorts
from vllm_omni.engine.lora import LoRASource, loras_of
from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.media.messages import has_media, is_messages
from vllm_omni.messages import StageTask
from vllm_omni.params import SamplingParams, StageParams
from vllm_omni.payload import PortSpec, StageSignature, TensorSpec
from vllm_omni.payload import TextSpec as TextPort
from vllm_omni.request import OmniRequest, Prompt
from vllm_omni.utils.files import ModelFolders
from vllm_omni.worker.ar.language_model import LanguageModelFolder
from vllm_omni.worker.ar.model_runner import ModelRunner
from vllm_omni.worker.ar.prompt_reader import PromptReader
from vllm_omni.worker.lora.target import LoRATarget

ONE_READER = "other stages read what this one writes, or its hidden states"


class TextSpec(ARSpec):
    """Task `generate` writes text, task `encode` computes the hidden states of a prompt; either gives the states that
    its `outputs` tap, whole or row by row.
    """

    def __init__(
        self, stage: StageConfig, config: OmniConfig, folders: ModelFolders, model: LanguageModelFolder
    ) -> None:
        super().__init__(stage, config, folders, model)
        self.can_write = self.options.can_write
        self.lora = None if self.options.lora is None else self._lora_source(self.options.lora)
        self.takes_loras = self.lora is not None
        self.reads_params = self.can_write or self.takes_loras
        beyond = model.config.scaled_beyond
        depends_on_length = beyond is not None and self.model_len > beyond
        self.prefix_caching = self.options.prefix_caching and not depends_on_length
        self._reader_class: type[PromptReader[Any]] | None = model.model_class.prompt_reader
        if self._reader_class is not None:
            self.request_keys = self._reader_class.request_keys
            self.input_media = self._reader_class.input_media
        template = self.options.prompt_template
        self._images = None if template is None else template.images
        if self._images is not None:
            self.request_keys, self.media_keys = self.request_keys | {IMAGE}, self.media_keys | {IMAGE}
        self._reads_request = self.options.prompt == "prompt" and "prompt" not in stage.inputs
        if self._reads_request:
            self.request_keys |= prompt_keys(self.options)
        self._text_is_read = any(
            edge.source == f"{stage.name}.text" for other in config.stages.values() for edge in other.edges.values()
        )
        self._check()
        reads_file = self.can_write and self.options.generation_config == "read"
        self._checkpoint_defaults = generation_defaults(model.folder) if reads_file else {}
        self.defaults = {**self._checkpoint_defaults, **stage.defaults}
        self.signature = self._make_signature()
        configured = self.options.tokenizer
        named = folders.resolve(configured, stage.revision) if configured else None
        self._tokenizer_folder = find_tokenizer(model.folder, named)
        self._check_tokenizer()
        self._input_lock = threading.Lock()
        if self.options.prompt_template is not None or self.options.pad_prompt_to is not None:
            check_prompt_rows(self.options, model.config, self.model_len, self.processor)

    @property
    def input(self) -> ARInput:
        """The tokenizer and what else reads prompts, loaded once, when it is first needed."""
        with self._input_lock:
            return self._input

    @property
    def processor(self) -> TextProcessor:
        """The tokenizer."""
        with self._input_lock:
            return self._processor

    @property
    def pad_token_id(self) -> int:
        """What prompts are padded with, where they are."""
        found = self.processor.pad_token_id
        assert found is not None, "checked when the spec was made"
        return found

    def warm_up(self) -> None:
        if "prompt" not in self.stage.inputs:
            _ = self.input

    def check(self, request: OmniRequest, params: StageParams, reads: ReadPorts) -> Prepared | None:
        """The prompt's tokens, or what its media's headers say; None where an edge brings the prompt."""
        checked = self._checked_params(params, reads)
        if self.lora is not None:
            self.lora.plans(loras_of(checked))
        if "prompt" in self.stage.inputs:
            return None
        return self.input.prepare(read_prompt(self.options, request, {}), request, checked)

    def portable(self, prepared: Any) -> PreparedPrompt | None:
        is_text = isinstance(prepared, PreparedPrompt) and prepared.media is None
        return prepared if is_text else None

    def close(self) -> None:
        with self._input_lock:
            if "_processor" in self.__dict__:  # else it was never needed
                self._processor.close()

    def cache_key(self, task: StageTask) -> str | None:
        prompt = read_prompt(self.options, task.request, task.inputs)
        if self.can_write or self._holds_media(prompt, task.request):  # media have no content that is compared here
            return None
        content = prompt if isinstance(prompt, str) else [dict(x) if isinstance(x, Mapping) else int(x) for x in prompt]
        stage, folder = self.stage, str(self.model.folder.resolve())
        said = {key: task.request.fields.get(key) for key in sorted(self.request_keys)}
        adapters = None if self.lora is None else self.lora.key(loras_of(task.params))
        identity = [stage.name, folder, stage.device, self.precision.name, repr(self.options), content, said, adapters]
        return sha256(json.dumps(identity, sort_keys=True, default=repr).encode()).hexdigest()

    def job_size(self, request: OmniRequest, params: StageParams, prepared: Any) -> float:
        """In forward passes of one token, a prompt token counting a tenth."""
        num_new_tokens = 0
        if self.can_write and isinstance(params, SamplingParams):
            num_new_tokens = (params.max_tokens or 256) * (params.n or 1)
        return self._num_prompt_tokens(request, prepared) / 10 + num_new_tokens

    def prefixes(self, params: StageParams, prepared: Any) -> tuple[int, ...]:
        if not self.prefix_caching or not isinstance(prepared, PreparedPrompt):
            return ()
        adapters = None if self.lora is None else self.lora.key(loras_of(params))
        return prefix_hashes(prepared.token_ids, self.options.block_size, adapters)

    def note(self) -> str:
        """Besides: what is done to prompts, and where the parameters come from that a request leaves unset."""
        said = [f"{name} {value} (config)" for name, value in self.stage.defaults.items()]
        said += [
            f"{name} {value:g} ({FILE})"
            for name, value in self._checkpoint_defaults.items()
            if name not in self.stage.defaults
        ]
        return "; ".join(
            [super().note(), *describe_prompt_rows(self.options), *([f"defaults: {', '.join(said)}"] if said else [])]
        )

    def tapped_layers(self, reads: ReadPorts) -> frozenset[int]:
        return frozenset(layer for port, layers in self.tapped.items() if port in reads for layer in layers)

    def make_stage(self, context: EngineContext, runner: ModelRunner) -> TextStage:
        return TextStage(self, context.reads, runner)

    def _lora_source(self, config: LoRAConfig) -> LoRASource:
        model = self.model
        return LoRASource(
            config,
            lambda: LoRATarget(model.build(), model.published_shapes(), {}),
            lambda: self.precision.dtype.itemsize,
        )

    @cached_property
    def _processor(self) -> TextProcessor:
        if self._tokenizer_folder is None:
            return NoTokenizer(self.model.folder)
        return TextProcessor(
            self._tokenizer_folder,
            chat_template=self.options.chat_template,
            template_kwargs=self.options.chat_template_kwargs,
            system_prompt=self.options.system_prompt,
            prompt_template=self.options.prompt_template,
        )

    @cached_property
    def _input(self) -> ARInput:
        make, limits = self._reader_class, self.limits
        self._processor.start()
        area = None if self._images is None else self._images.image_area
        reader = None if make is None else make(self.model.folder, self._processor.encode, limits, area)
        return ARInput(self.options, self._processor, self.ar_limits, reader, self._reads_request)

    def _holds_media(self, prompt: Prompt, request: OmniRequest) -> bool:
        """Whether it is about more than words."""
        return bool(source_images(self.options, request)) or (is_messages(prompt) and has_media(prompt))

    def _checked_params(self, params: StageParams, reads: ReadPorts) -> SamplingParams:
        if not self.can_write:  # it samples nothing; the other parameters are meant for other stages
            assert isinstance(params, SamplingParams)
            return params
        is_read = reads.by_stages or any(port in reads for port in self.tapped)
        checked = self.ar_limits.check_params(params, why_one=ONE_READER if is_read else None)
        if checked.stop and self._tokenizer_folder is None:
            raise InvalidRequestError("stop: got strings, but the checkpoint has no tokenizer; give stop_token_ids")
        return checked

    def _num_prompt_tokens(self, request: OmniRequest, prepared: Any) -> float:
        if self.options.padded_len is not None:
            return self.options.padded_len
        if isinstance(prepared, PreparedPrompt | PlannedPrompt):
            return prepared.num_tokens
        prompt = read_prompt(self.options, request, {})  # stands in for what an edge will bring
        return len(prompt) / 4 if isinstance(prompt, str) else len(prompt)

    def _check(self) -> None:
        """What the options ask for and the model, or the rest of the stage, has not."""
        stage, options = self.stage, self.options
        if options.can_write and not self.model.config.can_write:
            raise ConfigError(
                "task: got 'generate', but the model has no head; use task: encode, or a checkpoint with a head"
            )
        if options.prompt != "prompt" and "prompt" in stage.inputs:
            raise ConfigError(f"prompt: got {options.prompt!r}, but inputs.prompt brings the prompt; keep one of them")
        if stage.defaults and not options.can_write:
            raise ConfigError(f"defaults: got {list(stage.defaults)}, but task encode samples nothing; remove it")
        if options.generation_config != "read" and not options.can_write:
            raise ConfigError("generation_config: task encode samples nothing; remove it")
        if self._images is not None and "image" not in self.input_media:
            raise ConfigError(
                f"prompt_template.images: got it, but the model in {self.model.folder} reads text alone, expected one "
                "with the weights of its vision encoder and the settings of its processor; remove the key, or set "
                "reads_media: true to see what is missing"
            )
        for port in sorted(PROMPT_FACTS.intersection((*options.outputs, *options.sections))):
            if self._reader_class is not None:
                raise ConfigError(f"outputs: got {port}, which the stage gives by itself; choose another name")

    def _check_tokenizer(self) -> None:
        """Without one, prompts and answers are token ids: ConfigError for what needs words."""
        if self._tokenizer_folder is not None:
            return
        stage, options = self.stage, self.options
        needed = {
            "inputs.prompt": "prompt" in stage.inputs,
            "sections": bool(options.sections),
            "system_prompt": options.system_prompt is not None,
            "chat_template_kwargs": bool(options.chat_template_kwargs),
            "prompt_template": options.prompt_template is not None,
            "pad_prompt_to": options.pad_prompt_to is not None,
            "media in prompts": self._reader_class is not None,
            "a stage that reads its text": self._text_is_read,
        }
        for key, is_needed in needed.items():
            if is_needed:
                raise ConfigError(
                    f"tokenizer: found none in {self.model.folder} or beside it, which {key} needs; set the stage's "
                    "`tokenizer` to the folder of one"
                )

    def _make_signature(self) -> StageSignature:
        width = self.model.config.hidden_size
        states: dict[str, PortSpec] = {
            port: TensorSpec(("T", len(layers) * width)) for port, layers in self.tapped.items()
        }
        if self._reader_class is not None:
            states |= {POSITIONS: TensorSpec(("T", 3)), TOKENS: TensorSpec(("T",))}
        text = {"text": TextPort()} if self.can_write else {}
        return StageSignature(
            inputs={"prompt": TextPort()},
            outputs={**text, **{label: TextPort() for label in self.options.sections}, **states},
            required_inputs=frozenset({"prompt"} & self.stage.inputs.keys()),  # the request's own is no stand-in for it
            results=frozenset(text),
            meta=self.options.meta_keys,
            streamed_outputs=frozenset(states),
        )
