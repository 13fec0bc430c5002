"""A thinker and a talker of a tiny checkpoint joined by a plain loop, and what transformers says of the same
request.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from support.ar import KNOWN, is_busy, load, make_options, make_spec, make_tokenizer, submit
from support.speech import CODEC_EOS, SPECIAL
from torch import Tensor

from vllm_omni.config.schema import StageConfig
from vllm_omni.engine.ar.engine import AREngine
from vllm_omni.engine.ar.text_spec import TextSpec
from vllm_omni.messages import ChunkConsumed, StageDone, StageEvent, StageFailed, StageProgress, StageRows, StageTask
from vllm_omni.models.qwen2_5_omni.talker_job import PORTS
from vllm_omni.params import SamplingParams
from vllm_omni.payload import StreamChunk
from vllm_omni.request import OmniRequest
from vllm_omni.worker.ar.media_prompt import MediaItem, MediaPrompt, content_ids_of
from vllm_omni.worker.model_pool import ModelPool

EOS, PAD = 2, 0  # of the tokenizer
THINKER_PORTS = PORTS  # that a talker reads
STATES = {
    "prompt_states": {"layers": [0, -1], "tokens": "prompt"},
    "reply_states": {"layers": [0, -1], "tokens": "followed"},
}
WORDS, CODES = 12, 40
TEXT = SamplingParams(temperature=0, max_tokens=WORDS)
SPEECH = SamplingParams(temperature=0, max_tokens=CODES)


@dataclass
class Case:
    """A prompt for both sides: ours, and the arguments of the reference's generate."""

    token_ids: list[int]
    items: list[MediaItem] = field(default_factory=list)
    theirs: dict[str, Tensor] = field(default_factory=dict)

    def prompt(self, model: Any) -> MediaPrompt:
        lengths = self.theirs["feature_attention_mask"].sum(1) if "feature_attention_mask" in self.theirs else None
        ids = torch.tensor([self.token_ids])
        positions, delta = model.thinker.get_rope_index(
            ids,
            self.theirs.get("image_grid_thw"),
            self.theirs.get("video_grid_thw"),
            torch.ones_like(ids),
            False,
            lengths,
            self.theirs.get("video_second_per_grid"),
        )
        content = content_ids_of(self.token_ids, self.items)
        return MediaPrompt(self.token_ids, content, positions[:, 0].long(), int(delta), tuple(self.items))


def make_case(kinds: str, seed: int = 0, before: Iterable[int] = (5, 6, 7), after: Iterable[int] = (8, 9)) -> Case:
    """kinds: letters of image, audio, video, in order."""
    generator = torch.Generator().manual_seed(seed)
    case = Case(list(before))
    for kind in kinds:
        {"i": _add_image, "a": _add_audio, "v": _add_video}[kind](case, generator)
        case.token_ids += [20 + seed, 21]
    case.token_ids += after
    return case


def _place(case: Case, kind: str, count: int, around: tuple[int, int]) -> Tensor:
    start = len(case.token_ids) + 1
    case.token_ids += [around[0], *[SPECIAL[kind]] * count, around[1]]
    return torch.arange(start, start + count)


def _join(case: Case, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        case.theirs[name] = torch.cat([case.theirs[name], tensor]) if name in case.theirs else tensor


def _add_image(case: Case, generator: torch.Generator) -> None:
    pixels, grid = torch.randn(24, 96, generator=generator), torch.tensor([1, 4, 6])
    indices = _place(case, "image", 6, (106, 107))
    case.items.append(MediaItem("image", indices, {"pixel_values": pixels, "grid_thw": grid}))
    _join(case, pixel_values=pixels, image_grid_thw=grid[None])


def _add_video(case: Case, generator: torch.Generator) -> None:
    pixels, grid, seconds = torch.randn(48, 96, generator=generator), torch.tensor([3, 4, 4]), torch.tensor(0.4)
    indices = _place(case, "video", 12, (106, 107))
    inputs = {"pixel_values": pixels, "grid_thw": grid, "second_per_grid": seconds}
    case.items.append(MediaItem("video", indices, inputs))
    _join(case, pixel_values_videos=pixels, video_grid_thw=grid[None], video_second_per_grid=seconds[None])


def _add_audio(case: Case, generator: torch.Generator) -> None:
    features = torch.randn(16, 27, generator=generator)
    indices = _place(case, "audio", 7, (SPECIAL["audio_bos"], SPECIAL["audio_eos"]))
    case.items.append(MediaItem("audio", indices, {"features": features}))
    _join(case, input_features=features[None], feature_attention_mask=torch.ones(1, 27, dtype=torch.long))


class Spoken(Exception):
    """Ends the reference where its codes are known."""


def padded(token_ids: list[int]) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` for the reference, one hidden token on the left.

    Its `generate` drops a mask of ones, but it is by a mask that its talker knows to add the marks of the begin and to
    use positions of three axes.
    """
    ids = torch.tensor([[PAD, *token_ids]])
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def reference(model: Any, case: Case, speaker: str = "Chelsie", **limits: int) -> tuple[list[int], list[int]]:
    """Words and codes of transformers' generate, greedy."""
    ids = torch.tensor([case.token_ids])
    found: list[Tensor] = []

    def note(_: Any, args: tuple[Any, ...], kwargs: Any) -> None:
        found.append(args[0])
        raise Spoken

    words = {"max_new_tokens": WORDS, "eos_token_id": EOS, **limits}
    media = {**case.theirs, "attention_mask": torch.ones_like(ids)}
    written = model.thinker.generate(input_ids=ids, do_sample=False, **media, **words)[0, ids.shape[1] :].tolist()
    media |= padded(case.token_ids)
    hook = model.token2wav.register_forward_pre_hook(note, with_kwargs=True)
    try:
        model.generate(
            speaker=speaker,
            talker_do_sample=False,
            talker_max_new_tokens=CODES,
            talker_eos_token_id=list(CODEC_EOS),
            thinker_do_sample=False,
            **{f"thinker_{key}": value for key, value in words.items()},
            # its talker refuses pixels that are not said to be the thinker's
            **{f"thinker_{key}" if key.startswith("pixel_values") else key: media[key] for key in media},
        )
    except Spoken:
        pass
    finally:
        hook.remove()
    return written, found[0][0].tolist()


def make_stage(folder: Path, part: str, **options: Any) -> StageConfig:
    if part == "thinker":
        if not (folder / "words").exists():
            make_tokenizer().save_pretrained(folder / "words")
        options = {"tokenizer": str(folder / "words"), "outputs": STATES, **options}
    return StageConfig(
        name=part,
        kind="ar",
        model=str(folder),
        inputs={"prompt": "somebody.text"} if part == "thinker" else {},
        device="cpu",
        dtype="float32",
        options=make_options(part=part, **{"block_size": 4, "max_num_seqs": 8, **options}),
    )


def make_engine(
    folder: Path,
    part: str,
    models: ModelPool | None = None,
    wanted: Iterable[str] = (),
    streamed: Iterable[str] | None = None,
    **options: Any,
) -> AREngine:
    ports = {"thinker": THINKER_PORTS, "talker": frozenset({"codes"})}[part] if streamed is None else streamed
    return load(make_spec(make_stage(folder, part, **options)), whole=wanted, streamed=ports, models=models)


def make_task(
    part: str, request_id: str, inputs: Mapping[str, Any], params: SamplingParams, **fields: Any
) -> StageTask:
    return StageTask(OmniRequest(prompt="unused", request_id=request_id, fields=fields), part, params, inputs)


def submit_prompt(engine: AREngine, name: str, prompt: list[int] | MediaPrompt, params: SamplingParams) -> None:
    """Submits a task of a thinker: token ids as an edge brings them, or a prompt that has been read."""
    if isinstance(prompt, MediaPrompt):
        spec = KNOWN[engine][0]
        assert isinstance(spec, TextSpec)
        task = make_task("thinker", name, {}, params)
        engine.submit(dataclasses.replace(task, prepared=spec.input.accept(prompt, params)))
    else:
        submit(engine, make_task("thinker", name, {"prompt": prompt}, params))


class Speech:
    """Runs requests through a thinker and a talker, handing rows over as they come, `chunk` reply rows at a time."""

    def __init__(self, thinker: AREngine, talker: AREngine, chunk: int = 1) -> None:
        self.thinker, self.talker, self.chunk = thinker, talker, chunk
        self.events: dict[str, list[StageEvent]] = {"thinker": [], "talker": []}
        self.words: dict[str, list[int]] = {}
        self.codes: dict[str, list[int]] = {}
        self.failed: dict[str, StageFailed] = {}
        self.speakers: dict[str, str] = {}
        self.speech = SPEECH
        self.num_given: Counter[str] = Counter()
        self._ports: dict[str, dict[str, tuple[list[Tensor], int, bool]]] = {}
        self._started: set[str] = set()

    def submit(self, name: str, prompt: Any, text: SamplingParams = TEXT, speaker: str = "Chelsie") -> None:
        self.speakers[name] = speaker
        self._ports[name] = {port: ([], 0, False) for port in THINKER_PORTS}
        self.codes[name] = []
        submit_prompt(self.thinker, name, prompt, text)

    def run(self, max_steps: int = 5000) -> None:
        for _ in range(max_steps):
            if not is_busy(self.thinker) and not is_busy(self.talker):
                return
            self.step()
        raise AssertionError("no end")

    def step(self) -> None:
        for event in self.thinker.step():
            self._note("thinker", event)
            if isinstance(event, StageRows):
                parts, given, _ = self._ports[event.request_id][event.port]
                self._ports[event.request_id][event.port] = ([*parts, event.rows], given, event.is_last)
                self._hand_over(event.request_id, event.port)
            elif isinstance(event, StageDone):
                self.words[event.request_id] = event.payload.meta["token_ids"]
                for port, (parts, given, _) in self._ports[event.request_id].items():
                    self._ports[event.request_id][port] = (parts, given, True)
                    self._hand_over(event.request_id, port)
        for event in self.talker.step():
            self._note("talker", event)
            if isinstance(event, StageRows):
                self.codes[event.request_id] += event.rows.tolist()
        for engine in (self.thinker, self.talker):
            engine.check_integrity()

    def abort(self, name: str) -> None:
        self.thinker.abort(name)
        self.talker.abort(name)
        self._ports.pop(name, None)

    def consumed(self, port: str = "reply_states") -> int:
        return sum(isinstance(event, ChunkConsumed) and event.port == port for event in self.events["talker"])

    def _note(self, part: str, event: StageEvent) -> None:
        if not isinstance(event, StageProgress):
            self.events[part].append(event)
        if isinstance(event, StageFailed):
            self.failed[event.request_id] = event

    def _hand_over(self, name: str, port: str) -> None:
        """Gives the talker what is there, and starts it with the first chunk of every port, as a scheduler would."""
        if name not in self._started:
            if all(parts or is_last for parts, _, is_last in self._ports[name].values()):
                self._started.add(name)
                chunks = {port: self._next(name, port) for port in THINKER_PORTS}
                task = make_task("talker", name, chunks, self.speech, speaker=self.speakers[name])
                submit(self.talker, task)
            return
        while (chunk := self._next(name, port)) is not None:
            self.talker.feed(name, port, chunk)

    def _next(self, name: str, port: str) -> StreamChunk | None:
        parts, given, is_last = self._ports[name][port]
        width = {"prompt_positions": 3}.get(port, 64)
        dtype = torch.long if port == "prompt_positions" else torch.float32
        rows = torch.cat(parts) if parts else torch.empty(0, width, dtype=dtype)
        size = min(self.chunk if port == "reply_states" else 5, len(rows) - given)
        if given < 0 or (size == 0 and not is_last) or (given == len(rows) and given and not is_last):
            return None
        ends = is_last and given + size == len(rows)
        self.num_given[port] += 1
        self._ports[name][port] = (parts, -1 if ends else given + size, is_last)
        return StreamChunk(rows[given : given + size], start=given, is_last=ends)
