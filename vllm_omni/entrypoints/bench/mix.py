"""What a load asks for: kinds of work by weight, each with prompts and the body of its requests. Read from YAML."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vllm_omni.errors import ConfigError
from vllm_omni.utils.checks import brief, check_number, did_you_mean

ROUTES = {
    "chat": "/v1/chat/completions",
    "completion": "/v1/completions",
    "image": "/v1/images/generations",
    "speech": "/v1/audio/speech",
    "video": "/v1/videos/sync",
}
SET_BY_US = ("model", "messages", "prompt", "input", "stream", "stream_options")  # not a mix's to say
MAX_WORKS = 100
MAX_PROMPTS = 100_000


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """One request of a load. body: all of it but for the model's name and the wish for a stream."""

    work: str
    kind: str  # a key of ROUTES
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One kind of request in a mix; checked when made."""

    name: str
    kind: str  # a key of ROUTES
    prompts: Sequence[str]  # in turn
    weight: float = 1.0  # its share of the requests, against the other weights
    body: Mapping[str, Any] = field(default_factory=dict)  # what a request says besides its prompt

    def __post_init__(self) -> None:
        where = f"works.{self.name}"
        if self.kind not in ROUTES:
            raise ConfigError(f"{where}.kind: got {brief(self.kind)}{did_you_mean(str(self.kind)[:80], ROUTES)}")
        if isinstance(self.prompts, str) or not isinstance(self.prompts, Sequence) or not self.prompts:
            raise ConfigError(f"{where}.prompts: got {brief(self.prompts)}, expected a list of texts")
        if len(self.prompts) > MAX_PROMPTS or not all(isinstance(prompt, str) for prompt in self.prompts):
            raise ConfigError(f"{where}.prompts: expected at most {MAX_PROMPTS} texts, and nothing but texts")
        check_number(f"{where}.weight", self.weight, 0, above_low=True, raises=ConfigError)
        if not isinstance(self.body, Mapping):
            raise ConfigError(f"{where}.body: got {brief(self.body)}, expected fields of the request's body")
        for key in self.body:
            if key in SET_BY_US:
                raise ConfigError(f"{where}.body.{key}: the load says it itself; leave it out")

    def request(self, number: int) -> BenchRequest:
        """The `number`-th one of this work, from 0 on."""
        prompt = self.prompts[number % len(self.prompts)]
        if self.kind == "chat":
            return BenchRequest(self.name, self.kind, {**self.body, "messages": [{"role": "user", "content": prompt}]})
        field_name = "input" if self.kind == "speech" else "prompt"
        return BenchRequest(self.name, self.kind, {**self.body, field_name: prompt})


@dataclass(frozen=True, slots=True)
class Mix:
    works: Sequence[Work]

    @classmethod
    def read(cls, path: Path) -> Mix:
        """Of a YAML file `works: {NAME: {kind, prompts, weight, body}}`; ConfigError says what is wrong with it."""
        try:
            found = yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"--mix: got {str(path)!r}, expected a YAML file ({reason:.300})") from error
        try:
            return cls.of(found)
        except ConfigError as error:
            raise ConfigError(f"--mix {path}: {error}") from error

    @classmethod
    def of(cls, found: Any) -> Mix:
        if not isinstance(found, Mapping) or list(found) != ["works"]:
            raise ConfigError(f"got {brief(found)}, expected one key: works: {{NAME: ...}}")
        works = found["works"]
        if not isinstance(works, Mapping) or not 0 < len(works) <= MAX_WORKS:
            raise ConfigError(f"works: got {brief(works)}, expected 1 to {MAX_WORKS} names, each with its work")
        return cls([_work(str(name), about) for name, about in works.items()])

    def draw(self, num_requests: int, seed: int) -> list[BenchRequest]:
        """Requests in the order in which they are sent: the same for the same seed."""
        chosen = random.Random(seed).choices(self.works, [work.weight for work in self.works], k=num_requests)
        counts = {work.name: 0 for work in self.works}
        requests = []
        for work in chosen:
            requests.append(work.request(counts[work.name]))
            counts[work.name] += 1
        return requests


def _work(name: str, about: Any) -> Work:
    known = ("kind", "prompts", "weight", "body")
    if not isinstance(about, Mapping):
        raise ConfigError(f"works.{name}: got {brief(about)}, expected the keys {', '.join(known)}")
    for key in about:
        if key not in known:
            raise ConfigError(f"works.{name}: got the key {brief(key)}{did_you_mean(str(key)[:80], known)}")
    for key in ("kind", "prompts"):
        if key not in about:
            raise ConfigError(f"works.{name}.{key}: missing")
    return Work(name=name, **about)
