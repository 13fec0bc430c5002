"""Talkers of tiny Qwen3-TTS folders without the stage behind them, and how requests are put to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from support.ar import drain, load, make_spec, submit
from support.qwen3_tts import Case, answers, cases, sound
from torch import Tensor, nn

from vllm_omni.config.builder import build
from vllm_omni.config.schema import StageConfig
from vllm_omni.engine.ar.engine import AREngine
from vllm_omni.engine.ar.talker.inputs import TalkerInputs
from vllm_omni.messages import StageDone, StageEvent, StageRows, StageTask
from vllm_omni.models.qwen3_tts.cloned_voice import ClonedVoice
from vllm_omni.models.qwen3_tts.options import TalkerOptions
from vllm_omni.models.qwen3_tts.talker import Talker
from vllm_omni.models.qwen3_tts.talker_job import TalkerJob
from vllm_omni.models.qwen3_tts.talker_stage import TalkerStage
from vllm_omni.params import SamplingParams
from vllm_omni.request import OmniRequest
from vllm_omni.worker.model_pool import ModelPool

SAMPLE_RATE = 24000
CROWD = ("speaker", "speaker_whole_text", "dialect_auto", "speaker_instruct", "one_token")  # cases of one checkpoint
FRAMES = 12
DRAWN: dict[str, Any] = {"subtalker_temperature": 1.1, "subtalker_top_k": 30}
GREEDY_FIELDS = {"subtalker_temperature": 0}


class StoredVoice:
    """Gives for a case what the package made of its recording."""

    def __init__(self, case: Case) -> None:
        self._case = case

    def clone(self, samples: Tensor, has_frames: bool) -> ClonedVoice:
        found = answers()
        frames = torch.from_numpy(found[f"{self._case.name}.ref_codes"]) if has_frames else None
        return ClonedVoice(torch.from_numpy(found[f"{self._case.name}.embedding"]), frames)


class Talkers:
    """An engine for each task, and what goes through it."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self.folders = folders
        self.models = ModelPool()

    def engine(
        self, case: Case, wanted: Iterable[str] = ("codes",), streamed: Iterable[str] = (), **options: Any
    ) -> AREngine:
        """For the checkpoint of a case."""
        spec = make_spec(make_stage(self.folders[case.task], **options))
        engine = load(spec, whole=wanted, streamed=streamed, models=self.models)
        stage_of(engine)._cloner = StoredVoice(case)
        return engine

    def inputs(self, case: Case) -> TalkerInputs:
        """What the talker is fed of a case."""
        engine = self.engine(case)
        submit(engine, make_task(case))
        while not engine._jobs:
            engine.step()
        job = cast(TalkerJob, engine._jobs[case.name])
        opening = job._opening
        assert opening is not None
        inputs = opening.inputs()
        inputs.extend(opening.text(job._trailing).unbind(), is_last=True)
        return inputs

    def speak(self, case: Case, frames: int) -> tuple[Tensor, Tensor, Tensor]:
        """Greedy: codes [n, 16], logits of the first codes [n or n + 1, V], and of the others of two frames."""
        engine = self.engine(case)
        model = cast(Talker, stage_of(engine)._model)
        firsts, others = list[Tensor](), list[Tensor]()
        with Listening([model.codec_head], firsts), Listening(model.code_predictor.lm_head, others):
            submit(engine, make_task(case, SamplingParams(temperature=0, max_tokens=frames)))
            done = drain(engine)[-1]
        assert isinstance(done, StageDone), done
        residual = torch.stack(others[: 2 * 15]).view(2, 15, -1)
        return done.payload.tensors["codes"], torch.cat(firsts), residual


class Listening:
    """Notes what modules give."""

    def __init__(self, modules: Iterable[nn.Module], given: list[Tensor]) -> None:
        self._hooks = [module.register_forward_hook(lambda _, __, out: given.append(out)) for module in modules]

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()


def crowd(num_frames: int = FRAMES) -> list[StageTask]:
    """Unlike texts, voices, seeds and settings."""
    fields = [DRAWN, {}, {"subtalker_temperature": 2.0, "subtalker_top_p": 0.7}, DRAWN, {"subtalker_top_k": 0}]
    params = [SamplingParams(seed=seed, max_tokens=num_frames, min_tokens=num_frames) for seed in range(len(CROWD))]
    params[2] = dataclasses.replace(params[2], temperature=0.0)
    known = cases()
    return [make_task(known[name], params[index], **fields[index]) for index, name in enumerate(CROWD)]


def stage_of(engine: AREngine) -> TalkerStage:
    return cast(TalkerStage, engine._stage)


def make_stage(folder: Path, device: str = "cpu", **options: Any) -> StageConfig:
    return StageConfig(
        name="talker",
        kind="qwen3_tts_talker",
        model=str(folder),
        device=device,
        dtype="float32",
        options=build(TalkerOptions, {"block_size": 4, "max_num_seqs": 8, **options}),
    )


def make_task(case: Case, params: SamplingParams | None = None, name: str = "", **fields: Any) -> StageTask:
    params = SamplingParams(temperature=0, max_tokens=8) if params is None else params
    request = OmniRequest(
        prompt=case.text, request_id=name or case.name, fields={**GREEDY_FIELDS, **fields_of(case), **fields}
    )
    return StageTask(request, "talker", params)


def fields_of(case: Case) -> dict[str, Any]:
    """What a request of this case says beside its words."""
    fields: dict[str, Any] = {"language": case.language, "non_streaming_mode": not case.streams_text}
    fields |= {"speaker": case.speaker, "instructions": case.instruct}
    if case.sound_s is not None:
        fields |= {"ref_audio": (sound(case.sound_s), SAMPLE_RATE), "ref_text": case.ref_text}
        fields |= {"x_vector_only_mode": case.ref_text is None}
    return {key: value for key, value in fields.items() if value is not None}


def codes_of(events: Iterable[StageEvent], name: str) -> Tensor:
    rows = [event.rows for event in events if isinstance(event, StageRows) and event.request_id == name]
    return torch.cat(rows) if rows else torch.empty(0, 16, dtype=torch.int64)
