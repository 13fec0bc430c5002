"""Omni: prompts in, outputs out, in the caller's own thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from vllm_omni.config.schema import OmniConfig
from vllm_omni.entrypoints.dropping import end_when_dropped
from vllm_omni.entrypoints.loading import ConfigLike, load_executor, open_pipeline
from vllm_omni.entrypoints.progress import LoadingBar, ProgressBar
from vllm_omni.entrypoints.prompts import Params, PromptLike, make_request, pair, rejected
from vllm_omni.entrypoints.state_file import read_state, state_path, write_state
from vllm_omni.entrypoints.text_pieces import PieceThread, plain_pieces, without_pieces
from vllm_omni.entrypoints.turn import Turn
from vllm_omni.errors import InvalidRequestError, OmniError, QueueFullError, SchedulerError
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.request import OmniOutput, OmniRequest


class Omni:
    """A loaded pipeline of stages.

    config: a YAML file, the name of a shipped one, a mapping of the same content, an OmniConfig, or a Pipeline.
    model: a checkpoint folder or hub id; alone, it picks the shipped config that fits.
    overrides: "image.cache.threshold=0.1". device, dtype: for all stages, whatever the config says.
    progress: whether loading and long work show a bar, on a terminal or in a notebook.

    Calls from several threads are safe; each drives the one loop for all. A context manager that closes itself.
    """

    def __init__(
        self,
        config: ConfigLike | Pipeline | None = None,
        *,
        model: str | None = None,
        overrides: Sequence[str] = (),
        device: str | None = None,
        dtype: str | None = None,
        progress: bool = True,
    ) -> None:
        pipeline = open_pipeline(config, model=model, overrides=overrides, device=device, dtype=dtype)
        self._config = pipeline.config
        with LoadingBar(pipeline.config.name, len(pipeline.specs), progress) as bar:
            self._executor = load_executor(pipeline, bar.show)
        self._has_progress = progress
        self._turn = Turn()
        self._mailboxes: dict[str, deque[OmniOutput]] = {}
        self._is_closed = False
        self._end = end_when_dropped(self, self._executor.shutdown)

    @property
    def config(self) -> OmniConfig:
        return self._config

    def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        params: Params | Sequence[Params | None] | None = None,
    ) -> list[OmniOutput]:
        """One final output per prompt, in the order of the prompts.

        prompts: one or a list; a prompt is text, token ids, chat messages, a dict or an OmniRequest, or an iterator of
        a text's pieces, which is read as it goes on (in a thread of its own) while sound is made already. params: one
        object for the stages that take its type, {stage: params}, or a list with one of these per prompt.

        What goes wrong with one request stands in its output's `error`. Raises InvalidRequestError when the numbers of
        prompts and params differ, SchedulerError after `close`. An interrupt aborts what this call began.
        """
        pairs = pair(prompts, params)
        self._ensure_open()
        with ProgressBar(self._config.name, len(pairs), self._has_progress) as bar:
            outputs: dict[str, OmniOutput] = {}
            requests: dict[str, OmniRequest] = {}
            order: list[str | OmniOutput] = []
            for prompt, given in pairs:
                request = make_request(prompt, given)
                if isinstance(request, OmniRequest) and request.request_id in requests:
                    error = SchedulerError(f"request_id: {request.request_id!r} stands twice in this call")
                    request = rejected(request.request_id, error)
                if isinstance(request, OmniRequest):
                    requests[request.request_id] = request
                order.append(request if isinstance(request, OmniOutput) else request.request_id)
            with closing(self._run(list(requests.values()), bar.is_shown)) as running:
                for output in running:
                    bar.show(output)
                    if output.finished:
                        outputs[output.request_id] = output
        return [item if isinstance(item, OmniOutput) else outputs[item] for item in order]

    def stream(self, prompt: PromptLike, params: Params | None = None) -> Generator[OmniOutput, None, None]:
        """Partial outputs of one prompt as they are made (new text, new pieces of audio, what a stage of `outputs` has
        finished while others go on, previews where `num_previews` asks for them), each named by its stage; then exactly
        one final output that holds all text, audio and pictures. Each partial one tells in `progress` how far every
        stage is.

        The request begins at the first `next`. Closing the generator early, or an interrupt, aborts it in all stages at
        once; leaving a `for` over it closes it, `contextlib.closing` does where it has a name. Several may be open.
        """
        self._ensure_open()
        request = make_request(prompt, params)
        if isinstance(request, OmniOutput):
            yield request
            return
        yield from self._run([request], stream=True)

    def save_state(self, request_id: str, path: str | Path) -> None:
        """Writes a request that denoises to a `.safetensors` file from which `resume` goes on, in another process too,
        to the bit as if it had never stopped. Between two outputs of `stream`; the request itself goes on, until its
        stream is closed. InvalidRequestError for a request of which nothing can be saved now, and where the file cannot
        be written.
        """
        target = state_path(path)
        with self._turn.take():
            request = self._executor.save_state(request_id)
        write_state(target, request, self._config.name, self._config.limits)

    def resume(self, path: str | Path) -> OmniOutput:
        """The final output of a request that `save_state` wrote, on the same config. `stream(read_state(path))` gives
        its partial outputs too. InvalidRequestError for a file that is none; what is wrong otherwise, as that it was
        saved on another config, stands in the output's `error`.
        """
        return self.generate(read_state(path))[0]

    def restart_stage(self, name: str) -> None:
        """Restarts the replicas of a stage, one after another and each once its tasks have finished; that goes on with
        the next requests, none of which is lost. Models that are loaded into this process stay loaded. ConfigError for
        a stage that is not there.
        """
        self._ensure_open()
        with self._turn.take():
            self._executor.restart_stage(name)

    def get_status(self) -> dict[str, Any]:
        """Gauges: requests that wait and run, tasks by stage."""
        return self._executor.get_status()

    def get_metrics(self) -> dict[str, Any]:
        """Counters since loading: requests by end, caches, stages, planned memory."""
        with self._turn.take():
            return self._executor.get_metrics()

    def close(self) -> None:
        """Aborts what is unfinished and frees all stages; may be called twice."""
        self._is_closed = True
        if self._turn.is_mine():
            self._turn.do(self._shut_down)
            return
        with self._turn.take():
            self._shut_down()

    def __enter__(self) -> Omni:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, requests: list[OmniRequest], stream: bool) -> Generator[OmniOutput, None, None]:
        """Outputs of `requests` as they come, feeding them no faster than the queue takes them."""
        mailbox: deque[OmniOutput] = deque()
        waiting = deque(requests)
        unfinished: set[str] = set()
        texts: dict[str, PieceThread] = {}
        try:
            while waiting or unfinished or mailbox:
                while mailbox:
                    output = mailbox.popleft()
                    if output.finished:
                        unfinished.discard(output.request_id)
                        _stop_reading(texts, [output.request_id])
                    yield output
                with self._turn.take():
                    for request_id, pieces in self._feed(waiting, unfinished, mailbox, stream):
                        texts[request_id] = PieceThread(pieces, self._executor.wake)
                    self._extend(texts)
                    if not mailbox and (waiting or unfinished):
                        self._step()
                if not mailbox:
                    self._executor.wait()
        finally:
            _stop_reading(texts, list(texts))
            if unfinished:
                self._turn.do(partial(self._abort, unfinished, mailbox))

    def _feed(
        self, waiting: deque[OmniRequest], unfinished: set[str], mailbox: deque[OmniOutput], stream: bool
    ) -> list[tuple[str, Iterator[str]]]:
        """The texts in pieces of those that were admitted now."""
        begun: list[tuple[str, Iterator[str]]] = []
        while waiting:
            request = waiting[0]
            try:
                pieces = plain_pieces(request)
                self._executor.add_request(without_pieces(request), stream=stream)
            except QueueFullError:
                break
            except (SchedulerError, InvalidRequestError) as error:
                mailbox.append(rejected(request.request_id, error))
            else:
                self._mailboxes[request.request_id] = mailbox
                unfinished.add(request.request_id)
                begun += [] if pieces is None else [(request.request_id, pieces)]
            waiting.popleft()
        return begun

    def _extend(self, texts: Mapping[str, PieceThread]) -> None:
        """Hands on what has come of texts in pieces."""
        for request_id, text in texts.items():
            for item in text.take():
                if isinstance(item, OmniError):
                    self._executor.fail(request_id, item)
                else:
                    self._executor.extend(request_id, item or "", is_last=item is None)

    def _step(self) -> None:
        if not self._executor.has_work():
            raise SchedulerError("the outputs of these requests were lost in an interrupted step; start them again")
        self._route(self._executor.step())

    def _route(self, outputs: list[OmniOutput]) -> None:
        for output in outputs:
            if output.request_id in self._mailboxes:
                self._mailboxes[output.request_id].append(output)
                if output.finished:
                    del self._mailboxes[output.request_id]

    def _abort(self, request_ids: set[str], mailbox: deque[OmniOutput]) -> None:
        """Aborts what still delivers into this mailbox; an id whose request has ended may be another's by now."""
        for request_id in request_ids:
            if self._mailboxes.get(request_id) is mailbox:
                del self._mailboxes[request_id]
                self._executor.abort(request_id)
        self._route(self._executor.take_outputs())

    def _shut_down(self) -> None:
        self._end.detach()
        self._executor.shutdown()
        self._route(self._executor.take_outputs())

    def _ensure_open(self) -> None:
        if self._is_closed:
            raise SchedulerError("this Omni is closed; make a new one")


def _stop_reading(texts: dict[str, PieceThread], request_ids: list[str]) -> None:
    for text in [texts.pop(request_id) for request_id in request_ids if request_id in texts]:
        text.stop()
