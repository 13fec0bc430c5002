"""What a graph reads and makes, known from the specs of its stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_omni.engine.base import StageSpec
from vllm_omni.executor.pipeline import Pipeline
from vllm_omni.params import DiffusionParams, SamplingParams, StageParams
from vllm_omni.payload import TensorSpec
from vllm_omni.voices import VoiceStore

VOICE_KEYS = ("voice", "speaker")  # what stages call the choice of who speaks


@dataclass(frozen=True, slots=True)
class Abilities:
    """By stage names; every tuple in the order of the config's `outputs`."""

    texts: tuple[str, ...]  # stages whose text the caller gets
    images: tuple[str, ...]
    edits: tuple[str, ...]  # of the images' those that start from an image, where a request brings one
    audios: tuple[str, ...]
    videos: tuple[str, ...]
    frame_rate: float | None  # frames per second of the first of these, where a request says none
    embeddings: str | None  # "stage.port" of hidden states, [T, D]
    writer: str | None  # the stage that samples words, whether the caller gets them or not
    sampler: str | None  # the writer, else the stage that samples codes of speech
    input_media: frozenset[str]  # kinds of message parts that some stage reads besides text
    request_keys: frozenset[str]  # what a prompt may hold besides the words
    media_keys: frozenset[str]  # of these keys those that hold pictures or sounds
    reads_pieces: bool  # whether a text may come in pieces while the stages run
    adapted: frozenset[str]  # stages whose requests may name LoRA adapters
    voice_key: str | None  # of these keys the one that names who speaks
    own_voices: tuple[str, ...]  # the checkpoint's
    kept_voices: VoiceStore | None  # those that callers may add
    params_types: Mapping[str, type[StageParams]]

    @classmethod
    def of(cls, pipeline: Pipeline) -> Abilities:
        specs, graph = pipeline.specs, pipeline.graph
        tensors = [f"{stage}.{port}" for stage, port in graph.output_tensors if _is_rows(specs[stage], port)]
        speaking = [(key, spec) for key in VOICE_KEYS for spec in specs.values() if key in spec.request_choices]
        written = [name for name, spec in specs.items() if _writes(spec)]
        sampling = [name for name, spec in specs.items() if _samples(spec)]
        texts, images = _with_result(pipeline, "text"), _with_result(pipeline, "image")
        videos = _with_result(pipeline, "video")
        readers = [spec for spec in specs.values() if not issubclass(spec.params_type, DiffusionParams)]
        return cls(
            texts=texts,
            images=images,
            edits=tuple(stage for stage in images if "image" in specs[stage].request_keys),
            audios=_with_result(pipeline, "audio"),
            videos=videos,
            frame_rate=specs[videos[0]].frame_rate if videos else None,
            embeddings=tensors[0] if tensors else None,
            writer=next(iter((*texts, *written)), None),
            sampler=next(iter((*texts, *written, *sampling)), None),
            input_media=frozenset().union(*(spec.input_media for spec in readers)),
            request_keys=frozenset().union(*(spec.request_keys for spec in specs.values())),
            media_keys=frozenset().union(*(spec.media_keys for spec in specs.values())),
            reads_pieces=all(graph.edges_into(name) or spec.signature.text_inputs for name, spec in specs.items()),
            adapted=frozenset(name for name, spec in specs.items() if spec.takes_loras),
            voice_key=speaking[0][0] if speaking else None,
            own_voices=speaking[0][1].request_choices[speaking[0][0]] if speaking else (),
            kept_voices=next((spec.voices for spec in specs.values() if spec.voices is not None), None),
            params_types={name: spec.params_type for name, spec in specs.items()},
        )

    @property
    def voices(self) -> tuple[str, ...]:
        """All that a request may name now; the checkpoint's own come first, and win where names are equal."""
        kept = () if self.kept_voices is None else self.kept_voices.names()
        own = {name.lower() for name in self.own_voices}
        return (*self.own_voices, *(name for name in kept if name.lower() not in own))

    @property
    def makes(self) -> tuple[str, ...]:
        media = {"text": self.texts, "image": self.images, "audio": self.audios, "video": self.videos}
        return tuple(kind for kind, stages in {**media, "embedding": self.embeddings}.items() if stages)

    @property
    def is_chat(self) -> bool:
        """Whether it reads a conversation; else a prompt is one text."""
        return self.writer is not None

    def describe(self) -> dict[str, Any]:
        """For `/v1/models`."""
        return {
            "input_modalities": ["text", *sorted(self.input_media)],
            "output_modalities": list(self.makes),
            "voices": list(self.voices),
            "request_fields": sorted(self.request_keys),
        }


def _with_result(pipeline: Pipeline, port: str) -> tuple[str, ...]:
    return tuple(stage for stage in pipeline.graph.result_stages if port in pipeline.graph.signatures[stage].results)


def _is_rows(spec: StageSpec, port: str) -> bool:
    given = spec.signature.outputs[port]
    return isinstance(given, TensorSpec) and len(given.dims) == 2


def _samples(spec: StageSpec) -> bool:
    return spec.params_type is SamplingParams and spec.reads_params and spec.draws(SamplingParams())


def _writes(spec: StageSpec) -> bool:
    return spec.params_type is SamplingParams and spec.reads_params and "text" in spec.signature.outputs
