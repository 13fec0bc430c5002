"""Tiny random Qwen3 folders with a byte-level tokenizer, and an AREngine over them; all made on the fly."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from vllm_omni import registry
from vllm_omni.config.builder import build
from vllm_omni.config.schema import LimitsConfig, OmniConfig, StageConfig
from vllm_omni.engine.ar.engine import AREngine
from vllm_omni.engine.ar.options import AROptions
from vllm_omni.engine.ar.spec import ARSpec
from vllm_omni.engine.base import Activity, EngineContext, ReadPorts
from vllm_omni.errors import OmniError
from vllm_omni.messages import StageDone, StageEvent, StageFailed, StageTask
from vllm_omni.params import SamplingParams, StageParams
from vllm_omni.request import OmniRequest
from vllm_omni.utils.files import ModelFolders
from vllm_omni.worker.background import Background
from vllm_omni.worker.model_pool import ModelPool

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
EOS = 2
KNOWN: WeakKeyDictionary[AREngine, tuple[ARSpec, ReadPorts]] = WeakKeyDictionary()  # what each engine was made from
VOCABULARY = 320
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking %}{{ '<think>' }}{% endif %}{% endif %}"
)
PROMPT_STATES = {"h": {"layers": [-2], "tokens": "prompt"}}
WRITTEN_STATES = {"h": {"layers": [1, -1], "tokens": "completion"}}
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "eos_token_id": EOS,
}


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """All 256 bytes, the special tokens, and some merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    corpus = ["a red circle left of a blue square", "user assistant system", "the end of the world", "你好 你好 é ü"]
    tokenizer.train_from_iterator(corpus * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL_TOKENS[EOS],
        pad_token=SPECIAL_TOKENS[0],
        chat_template=chat_template,
    )


def make_model_folder(
    folder: Path,
    *,
    seed: int = 0,
    base_model: bool = False,
    scale: float = 0.2,
    template: str | None = CHAT_TEMPLATE,
    **config: Any,
) -> Path:
    """A checkpoint as transformers writes it, weights wide enough that greedy texts differ, and a tokenizer in it."""
    torch.manual_seed(seed)
    build = Qwen3Model if base_model else Qwen3ForCausalLM
    model = build(Qwen3Config(**{**TINY, "initializer_range": scale, **config}))
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "bias")):
            torch.nn.init.normal_(parameter, 1.0 if name.endswith("norm.weight") else 0.0, 0.2)
    model.save_pretrained(folder)
    make_tokenizer(template).save_pretrained(folder)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON file; None removes one."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def make_stage(
    folder: Path,
    *,
    name: str = "text",
    inputs: Mapping[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    **options: Any,
) -> StageConfig:
    return StageConfig(
        name=name,
        kind="ar",
        model=str(folder),
        inputs=inputs or {},
        defaults=defaults or {},
        device="cpu",
        dtype=dtype,
        options=make_options(**{"chat_template": False, "block_size": 4, "max_num_seqs": 8, **options}),
    )


def make_options(**options: Any) -> AROptions:
    """As a YAML would give them."""
    return build(AROptions, options)


def shared_text_config(folder: Path, *, stage: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
    """Of one language model that is compared with itself. stage: its keys besides; settings: of the whole config."""
    text = {"kind": "ar", "model": str(folder), "device": "cpu", "dtype": "float32", "block_size": 4}
    return {"stages": {"text": {**text, "chat_template": False, **stage}}, "outputs": ["text"], **settings}


def make_spec(
    stage: StageConfig,
    *,
    readers: Mapping[str, StageConfig] | None = None,
    limits: LimitsConfig | None = None,
    grants: bool = True,
) -> ARSpec:
    """readers: further stages of the config. grants: whether its KV pool may be as large as it can use."""
    config = OmniConfig(stages={stage.name: stage, **(readers or {})}, limits=limits or LimitsConfig())
    described: type[ARSpec] = registry.resolve("stage kind", stage.kind)
    spec = described.describe(stage, config, ModelFolders())
    spec.grant_memory(spec.plan_memory().wanted_bytes if grants else 0)
    return spec


def load(
    spec: ARSpec,
    *,
    whole: Iterable[str] = (),
    streamed: Iterable[str] = (),
    models: ModelPool | None = None,
    background: Background | None = None,
) -> AREngine:
    """The engine; of these ports somebody reads the rows."""
    reads = ReadPorts(frozenset(whole), frozenset(streamed))
    context = EngineContext(
        device=torch.device(spec.stage.device),
        dtype=spec.precision.dtype,
        models=ModelPool() if models is None else models,
        background=Background() if background is None else background,
        reads=reads,
    )
    engine = spec.load(context)
    KNOWN[engine] = (spec, reads)
    return engine


def make_engine(
    folder: Path,
    *,
    wanted: Iterable[str] = (),
    streamed: Iterable[str] = (),
    models: ModelPool | None = None,
    limits: LimitsConfig | None = None,
    readers: Mapping[str, StageConfig] | None = None,
    **stage_keys: Any,
) -> AREngine:
    """An engine of one stage named "text"; `readers` are further stages of the config."""
    spec = make_spec(make_stage(folder, **stage_keys), readers=readers, limits=limits)
    return load(spec, whole=wanted, streamed=streamed, models=models)


def make_encoder(folder: Path, **options: Any) -> AREngine:
    """An engine that encodes prompts and gives the states before the last layer as port "h"."""
    return make_engine(folder, **{"task": "encode", "wanted": ["h"], "outputs": PROMPT_STATES, **options})


def make_task(
    prompt: Any, params: StageParams | None = None, request_id: str = "r", inputs: Mapping[str, Any] | None = None
) -> StageTask:
    params = params or SamplingParams(temperature=0)
    return StageTask(OmniRequest(prompt=prompt, request_id=request_id, params=params), "text", params, inputs or {})


def check(engine: AREngine, request: OmniRequest, params: StageParams, *, by_stages: bool = False) -> Any:
    """What its spec makes of a request, or raises. by_stages: whether other stages read it for this one."""
    spec, reads = KNOWN[engine]
    return spec.check(request, params, dataclasses.replace(reads, by_stages=by_stages))


def submit(engine: AREngine, *tasks: StageTask) -> None:
    """Checks the tasks, as the planner does, and submits them with what came of that."""
    for task in tasks:
        engine.submit(dataclasses.replace(task, prepared=check(engine, task.request, task.params)))


def run(engine: AREngine, *tasks: StageTask, verify: bool = True) -> dict[str, StageDone | StageFailed]:
    """Checks and submits the tasks and steps to the end; the final event of each request."""
    submit(engine, *tasks)
    events = drain(engine, verify)
    return {event.request_id: event for event in events if isinstance(event, (StageDone, StageFailed))}


def is_busy(engine: AREngine) -> bool:
    return engine.activity() is Activity.BUSY


def drain(engine: AREngine, verify: bool = True, max_steps: int = 10_000) -> list[StageEvent]:
    """All events until the engine has nothing to do and waits for nothing in the background."""
    events: list[StageEvent] = []
    for _ in range(max_steps):
        activity = engine.activity()
        if activity is Activity.IDLE:
            return events
        if activity is Activity.PENDING:
            time.sleep(0.001)
        events += engine.step()
        if verify:
            engine.check_integrity()
    raise AssertionError(f"still at work after {max_steps} steps")


def done(event: StageDone | StageFailed) -> StageDone:
    assert isinstance(event, StageDone), event
    return event


def failed(event: StageDone | StageFailed, kind: type[OmniError] = OmniError) -> str:
    assert isinstance(event, StageFailed) and isinstance(event.error, kind), event
    return str(event.error)


def tokens_of(event: StageDone | StageFailed) -> list[int]:
    tokens: list[int] = done(event).payload.meta["token_ids"]
    return tokens


def states_of(event: StageDone | StageFailed) -> Tensor:
    """The tapped states of the port "h"."""
    return done(event).payload.tensors["h"]


def assert_clean(engine: AREngine) -> None:
    """Nothing waits, nothing runs, every block is free."""
    stats = engine.get_stats()
    assert engine.activity() is Activity.IDLE
    assert (stats["num_preparing"], stats["num_waiting"], stats["num_running"]) == (0, 0, 0)
    assert stats["num_free_blocks"] == stats["num_blocks"]
    engine.check_integrity()
