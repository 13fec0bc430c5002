"""What is known of a `umt5` stage before it runs: its folder, its tokenizer, and what a request says to it."""

from __future__ import annotations

import html
import json
import re
import threading
from functools import cached_property
from hashlib import sha256

import torch

from vllm_omni.config.schema import OmniConfig, StageConfig
from vllm_omni.engine.ar.tokenizer import TextProcessor, find_tokenizer
from vllm_omni.engine.base import EngineContext, MemoryPlan, ReadPorts, StageSpec, model_folder
from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.layers.weights import weights_bytes
from vllm_omni.messages import StageTask
from vllm_omni.models.wan.text.encoder import read_config
from vllm_omni.models.wan.text.options import UMT5Options
from vllm_omni.models.wan.text.stage import UMT5Engine
from vllm_omni.params import DiffusionParams, StageParams
from vllm_omni.payload import StageSignature, TensorSpec, TextSpec
from vllm_omni.request import OmniRequest
from vllm_omni.utils.checks import brief
from vllm_omni.utils.files import ModelFolders
from vllm_omni.utils.precision import Precision
from vllm_omni.worker.published_dtype import dtype_of_folders

SPACES = re.compile(r"\s+")


class UMT5Spec(StageSpec):
    """Stage kind `umt5`. Reads the request's prompt or negative prompt, or the text that an edge brings to `prompt`."""

    options_type = UMT5Options
    params_type = DiffusionParams
    reads_params = False

    def __init__(self, stage: StageConfig, config: OmniConfig, folders: ModelFolders) -> None:
        super().__init__(stage, config, folders)
        self.options: UMT5Options = UMT5Options() if stage.options is None else stage.options
        if stage.defaults:
            raise ConfigError(f"defaults: got {', '.join(stage.defaults)}, but this stage takes none; remove it")
        if self.options.prompt != "prompt" and "prompt" in stage.inputs:
            raise ConfigError(f"prompt: got {self.options.prompt!r}, but inputs.prompt brings the words; keep one")
        self.folder = model_folder(stage, folders, "the folder of a UMT5 encoder")
        self.config = read_config(self.folder)
        named = self.options.tokenizer
        found = find_tokenizer(self.folder, folders.resolve(named, stage.revision) if named else None)
        if found is None:
            raise ConfigError(f"tokenizer: found none in {self.folder} or beside it; set it to the folder of one")
        self._tokenizer_folder = found
        self._lock = threading.Lock()
        self.signature = StageSignature(
            inputs={"prompt": TextSpec()},
            outputs={"hidden_states": TensorSpec(("T", self.config.d_model))},
            required_inputs=frozenset({"prompt"} & stage.inputs.keys()),  # the request's own is no stand-in for it
        )

    def choose_dtype(self) -> Precision:
        """Its activations leave the range of float16."""
        chosen = super().choose_dtype()
        return Precision(torch.float32, "float16 is too narrow") if chosen.dtype == torch.float16 else chosen

    def published_dtype(self) -> torch.dtype | None:
        return dtype_of_folders([self.folder], self.stage.variant)

    def plan_memory(self) -> MemoryPlan:
        itemsize = self.precision.dtype.itemsize
        return MemoryPlan(
            weights_bytes=weights_bytes(self.folder, itemsize, variant=self.stage.variant),
            activation_bytes=self._activation_bytes(itemsize),
        )

    def weights_key(self) -> tuple[str, ...]:
        return (self.stage.kind, str(self.folder.resolve()), self.stage.variant or "")

    def check(self, request: OmniRequest, params: StageParams, reads: ReadPorts) -> list[int] | None:
        """The prompt's tokens; None where an edge brings it."""
        return None if "prompt" in self.stage.inputs else self.tokens(self._words(request))

    def cache_key(self, task: StageTask) -> str | None:
        words = task.inputs.get("prompt", self._words(task.request))
        identity = [self.stage.name, *self.weights_key(), self.stage.device, self.precision.name, repr(self.options)]
        return sha256(json.dumps([*identity, words]).encode()).hexdigest()

    def job_size(self, request: OmniRequest, params: StageParams, prepared: object) -> float:
        return len(prepared) / 10 if isinstance(prepared, list) else 1.0

    def load(self, context: EngineContext) -> UMT5Engine:
        return UMT5Engine(self, context)

    def warm_up(self) -> None:
        with self._lock:
            _ = self._processor

    def tokens(self, words: object) -> list[int]:
        """InvalidRequestError for what are no words, or too many."""
        if not isinstance(words, str):
            raise InvalidRequestError(f"{self.options.prompt}: got {brief(words)}, expected a string")
        if len(words) > self.limits.max_prompt_chars:
            raise InvalidRequestError(
                f"{self.options.prompt}: got {len(words)} characters, expected at most {self.limits.max_prompt_chars}"
                " (limits.max_prompt_chars)"
            )
        words, most = cleaned(words), self.options.max_prompt_tokens
        with self._lock:
            found = self._processor.encode(words)
            num_behind = 0 if len(found) <= most else self._processor.special_ends(words, found)[1]
        return found if len(found) <= most else [*found[: most - num_behind], *found[len(found) - num_behind :]]

    def _words(self, request: OmniRequest) -> object:
        return request.prompt if self.options.prompt == "prompt" else request.negative_prompt_text()

    def _activation_bytes(self, itemsize: int) -> int:
        """Scores of all heads with their positions, and the feed-forward, of one text of the longest."""
        tokens = self.options.max_prompt_tokens
        return tokens * (3 * self.config.num_heads * tokens + 4 * self.config.d_ff + 8 * self.config.d_model) * itemsize

    @cached_property
    def _processor(self) -> TextProcessor:
        return TextProcessor(self._tokenizer_folder, chat_template=False)


def cleaned(words: str) -> str:
    """As diffusers' pipeline_wan: entities of HTML (twice) as what they stand for, and single spaces."""
    return SPACES.sub(" ", html.unescape(html.unescape(words))).strip()
