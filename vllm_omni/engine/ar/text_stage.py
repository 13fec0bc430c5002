"""The running half of an AR stage over words: makes its jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from vllm_omni.core.ar.sequence import Sequence
from vllm_omni.engine.ar.base import ARStage, Generation
from vllm_omni.engine.ar.prompt import PlannedPrompt, Prepared, PreparedPrompt
from vllm_omni.engine.ar.tapped_states import TappedPort, TappedStates
from vllm_omni.engine.ar.text_job import Sample, TextJob
from vllm_omni.engine.ar.text_stream import StopRules, TextStream
from vllm_omni.engine.ar.tokenizer import end_of_sequence_ids
from vllm_omni.engine.base import ReadPorts
from vllm_omni.errors import InvalidRequestError, StageError
from vllm_omni.layers.sampler import SamplingRow
from vllm_omni.messages import StageTask
from vllm_omni.params import SamplingParams
from vllm_omni.worker.ar.media_inputs import MediaInputs
from vllm_omni.worker.ar.model_runner import ModelRunner
from vllm_omni.worker.background import Stop

if TYPE_CHECKING:
    from vllm_omni.engine.ar.text_spec import TextSpec


class TextStage(ARStage):
    """Writes texts, or encodes prompts, and gives the hidden states that somebody reads."""

    def __init__(self, spec: TextSpec, reads: ReadPorts, runner: ModelRunner) -> None:
        self._spec = spec
        self._reads = reads
        self._runner = runner
        self._input = spec.input
        self._processor = spec.processor
        self._eos_ids = end_of_sequence_ids(spec.model.folder, self._processor.tokenizer, spec.model.part)
        self._ports = {
            port: TappedPort(layers, str(spec.options.outputs[port].tokens)) for port, layers in spec.tapped.items()
        }
        self._reads_completion = any(tap.tokens == "completion" for port, tap in self._ports.items() if port in reads)

    def preparation(self, task: StageTask) -> Callable[[Stop], Prepared] | None:
        if task.prepared is None:  # chat templates are foreign code, and long texts take long
            return partial(self._brought, task)
        if isinstance(task.prepared, PlannedPrompt):
            return partial(self._input.read, task.prepared, _params(task))
        return None

    def start(self, task: StageTask, sequence_ids: Iterator[int]) -> TextJob:
        params, options = _params(task), self._spec.options
        prompt, pads = task.prepared, list[int]()
        assert isinstance(prompt, PreparedPrompt)
        if options.padded_len is not None:
            pads = [self._spec.pad_token_id] * (options.padded_len - prompt.num_tokens)
        media = None if prompt.media is None else MediaInputs(prompt.media, self._runner.encode, self._runner.device)
        sequences = [
            Sequence(
                next(sequence_ids),
                task.request_id,
                [*prompt.token_ids, *pads],
                max_tokens=prompt.num_tokens + len(pads) + prompt.max_new_tokens,
                is_writing=options.can_write,
                num_pads=len(pads),
                content_ids=None if prompt.media is None else list(prompt.media.content_ids),
            )
            for _ in range((params.n or 1) if options.can_write else 1)
        ]
        stop = StopRules(self._processor, params.stop or (), _skips_special_tokens(params))
        samples = [
            self._make_sample(sequence, params, stop, index, prompt)
            for index, sequence in enumerate(sequences if options.can_write else ())
        ]
        dropped = options.num_dropped_tokens
        states = TappedStates(sequences[0], self._ports, self._reads, self._runner, media, dropped)
        return TextJob(task, prompt, sequences, samples, states, media, options.sections)

    def _brought(self, task: StageTask, stop: Stop) -> Prepared:
        """What an edge brings, as tokens; StageError, with the name of the stage whose words they are. Pictures of the
        request are read with it.
        """
        params = _params(task)
        try:
            prepared = self._input.prepare(task.inputs["prompt"], task.request, params)
        except InvalidRequestError as error:
            source = self._spec.stage.edges["prompt"].source
            raise StageError(f"cannot read what {source} gave: {error}") from error
        return self._input.read(prepared, params, stop) if isinstance(prepared, PlannedPrompt) else prepared

    def _make_sample(
        self, sequence: Sequence, params: SamplingParams, stop: StopRules, index: int, prompt: PreparedPrompt
    ) -> Sample:
        eos_ids = frozenset() if params.ignore_eos else self._eos_ids
        ending_ids = eos_ids | frozenset(params.stop_token_ids or ())
        row = SamplingRow(params, sequence.token_ids, ending_ids, index)
        return Sample(
            index=index,
            generation=Generation(sequence, row, ending_ids, prompt.max_new_tokens),
            room_limit=prompt.room_limit,
            stream=TextStream(self._processor, stop, _skips_special_tokens(params)),
            runs_last_token=self._reads_completion,
        )


def _skips_special_tokens(params: SamplingParams) -> bool:
    return True if params.skip_special_tokens is None else params.skip_special_tokens


def _params(task: StageTask) -> SamplingParams:
    assert isinstance(task.params, SamplingParams)
    return task.params
