"""Odd HTTP. Every route, form, header, path, frame and connection is answered or refused in OpenAI's shape, in time;
the server lives on, keeps nothing and answers the good request behind it as before.
"""

from __future__ import annotations

import json
import re
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import httpx
import yaml
from fuzz.http_inputs import BODIES, body_bytes, form_bytes, head, odd_target
from fuzz.mutation import mutate_bytes
from fuzz.raw_http import Answer, Connection
from fuzz.rest import SHARED
from fuzz.web_sockets import converse
from support.ar import make_model_folder
from support.belongings import descriptors
from support.loopback import http
from support.server import ServerProcess

FLAGS = {
    "--request-timeout-s": 5,
    "--body-timeout-s": 1,
    "--write-timeout-s": 2,
    "--max-body-mb": 4,
    "--max-jobs": 8,
    "--job-lifetime-s": 5,
}
CHECK_EVERY = 100
MAX_HEALTH_S = 1.0
LEAKS = re.compile(r"Traceback|site-packages|\.py\b.{0,9}line|0x[0-9a-f]{7,}|/(?:usr|root|home|tmp|work|opt|srv)/\w")
GOOD = {"model": "words", "prompt": "the good one", "max_tokens": 6, "temperature": 0, "ignore_eos": True}


class Server:
    """A real one with every kind of model; a thread asks for its health all the while."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        flags = [str(word) for pair in FLAGS.items() for word in pair]
        self._server = ServerProcess([*_configs(Path(self._folder.name)), "tiny_omni", "tiny_speech"], flags)
        self._place = httpx.URL(self._server.address)
        self._kinds: list[Callable[[Random], str]] = [
            *[self._body] * 6,
            *[self._form] * 2,
            *[self._target] * 2,
            *[self._frames] * 3,
            self._raw,
            self._leave,
            self._slow,
        ]
        for index in range(30):  # libraries load now, pools are filled
            self._kinds[index % len(self._kinds)](Random(f"first {index}"))
        self._expected = self._good()
        self._server.wait_until_idle(60)
        self._descriptors = self._num_descriptors()
        self._count = 0
        self._num_said = len(self._server.errors)  # characters on stderr
        self.slowest_health_s = 0.0
        self._is_over = threading.Event()
        self._watch = threading.Thread(target=self._watch_health)
        self._watch.start()

    def __call__(self, random: Random) -> str:
        self._count += 1
        outcome = random.choice(self._kinds)(random)
        if self._count % CHECK_EVERY == 0:
            self.check()
        return outcome

    def check(self) -> None:
        """Nothing is left of what was asked so far, and the server is as it was."""
        said = self._server.errors[self._num_said :]
        self._num_said += len(said)
        found = LEAKS.search(said)
        assert found is None, f"{found.group()!r} in {said[max(0, found.start() - 200) :][:6_000]}"
        for job in self._server.get("/v1/jobs", params={"limit": 100}).json()["data"]:
            http.delete(f"{self._server.base_url}/jobs/{job['id']}", timeout=30)
        self._server.wait_until_idle(30)
        deadline_s = time.monotonic() + 5
        while self._num_descriptors() > self._descriptors + 4:  # connections that are being closed
            assert time.monotonic() < deadline_s, f"{self._num_descriptors()} descriptors, {self._descriptors} before"
            time.sleep(0.05)
        assert self._good() == self._expected, "the good request is answered in another way"
        assert self.slowest_health_s < MAX_HEALTH_S, f"/health took {self.slowest_health_s:.2f} s"

    def close(self) -> None:
        try:
            self.check()
            print(f"server: peak {self._peak_mb()} MB, /health at most {self.slowest_health_s * 1000:.0f} ms")
        finally:
            self._is_over.set()
            self._watch.join()
            self._server.stop()
            self._folder.cleanup()

    def _body(self, random: Random) -> str:
        """A body of JSON, changed somewhere."""
        route = random.choice(list(BODIES))
        body = body_bytes(random.choice(BODIES[route]), random)
        return self._exchange(head("POST", route, random, len(body)) + body, body)

    def _form(self, random: Random) -> str:
        route = random.choice(["/v1/images/edits", "/v1/images/variations"])
        content, kind = form_bytes(random)
        return self._exchange(head("POST", route, random, len(content), kind) + content, content)

    def _target(self, random: Random) -> str:
        """Odd methods, paths, queries and headers."""
        method, target = odd_target(random)
        return self._exchange(head(method, target, random, 0), target.encode("utf-8", "replace"), method)

    def _raw(self, random: Random) -> str:
        """Bytes that are hardly HTTP any more; the client says that it has no more of them."""
        route = random.choice(list(BODIES))
        body = body_bytes(random.choice(BODIES[route]), random)
        content = mutate_bytes(head("POST", route, random, len(body)) + body, random)
        if random.random() < 0.2:
            content = random.randbytes(random.choice([1, 30, 70_000]))
        with Connection(self._place) as connection:
            connection.send(content)
            connection.end()
            return f"raw: {connection.rest()[:12]!r:.16}"

    def _leave(self, random: Random) -> str:
        """A client that goes while its request runs, by the rules or without a word."""
        route, kind = random.choice(list(BODIES)), "application/json"
        body = json.dumps({**random.choice(BODIES[route]), **random.choice([{}, {"stream": True}])}).encode()
        if random.random() < 0.2:
            route, (body, kind) = "/v1/images/edits", form_bytes(random)
        sent = body[: random.choice([len(body), len(body) // 2])]
        with Connection(self._place) as connection:
            connection.send(head("POST", route, random, len(body), kind) + sent)
            time.sleep(random.choice([0.0, 0.01, 0.1, 0.4]))
            if random.random() < 0.5:
                connection.read(random.choice([1, 200, 2_000]), 0.2)
            connection.leave(rudely=random.random() < 0.5)
        return "left"

    def _slow(self, random: Random) -> str:
        """A body that comes in pieces, or not to its end."""
        route = random.choice(list(BODIES))
        body = body_bytes(random.choice(BODIES[route]), random)
        content = head("POST", route, random, len(body) + random.choice([0, 0, 1, 10])) + body
        with Connection(self._place) as connection:
            for start in range(0, len(content), max(1, len(content) // 4)):
                if not connection.send(content[start : start + max(1, len(content) // 4)]):
                    break
                time.sleep(random.choice([0.0, 0.05, 0.2]))
            return self._judged(connection.answer(), body, "POST")

    def _frames(self, random: Random) -> str:
        """A conversation over a WebSocket."""
        texts, outcome = converse(self._server.address, random)
        for sent, text in texts:
            self._check_words(text, sent)
            event = json.loads(text)
            if event["type"] == "error":
                error = event["error"]
                assert {"message", "type", "param", "code"} <= set(error), text[:500]
                assert error["type"] != "server_error" or error["code"] != "internal_error", text[:500]
        return outcome

    def _exchange(self, content: bytes, given: bytes, method: str = "POST") -> str:
        with Connection(self._place) as connection:
            connection.send(content)
            return self._judged(connection.answer(method), given, method)

    def _judged(self, answer: Answer | None, given: bytes, method: str) -> str:
        """What became of a request; AssertionError for an answer that no server may give."""
        if answer is None:
            return "closed"
        text = answer.body.decode("utf-8", "replace")
        assert answer.status not in (500, 422), f"{answer.status}: {text[:500]}\nof {given[:500]!r}"
        if answer.status < 400 or method == "HEAD":
            return str(answer.status)
        self._check_words(text, given.decode("utf-8", "replace"))
        if not answer.headers.get("content-type", "").startswith("application/json"):
            assert answer.status == 400 and text == "Invalid HTTP request received.", f"{answer.status} {text[:200]}"
            return "400 of bytes"
        error = json.loads(text)["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"], text[:500]
        return f"{answer.status} {error['code']}"

    def _check_words(self, text: str, given: str) -> None:
        found = LEAKS.search(text)
        assert found is None or found.group() in given, f"{found.group()!r} in {text[:1_000]}"

    def _good(self) -> Any:
        answer = http.post(f"{self._server.base_url}/completions", json=GOOD, timeout=30)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"]

    def _watch_health(self) -> None:
        with httpx.Client(base_url=self._server.address, timeout=30) as kept:
            while not self._is_over.wait(0.1):
                began_s = time.monotonic()
                assert kept.get("/health").status_code == 200
                self.slowest_health_s = max(self.slowest_health_s, time.monotonic() - began_s)

    def _num_descriptors(self) -> int:
        """But for memory that it shares with its stages."""
        kinds = descriptors(self._server.pid)
        return sum(number for kind, number in kinds.items() if not kind.startswith(SHARED))

    def _peak_mb(self) -> int:
        lines = Path(f"/proc/{self._server.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM"))


def _configs(folder: Path) -> list[str]:
    """A language model that writes, and one that gives vectors, both random."""
    model = make_model_folder(folder / "model")
    common = {"kind": "ar", "model": str(model), "device": "cpu", "dtype": "float32", "kv_memory_mb": 4}
    vectors = {**common, "task": "encode", "outputs": {"states": {"layers": [-1]}}, "chat_template": False}
    graphs = {"words": ({"text": common}, ["text"]), "vectors": ({"text": vectors}, ["text.states"])}
    for name, (stages, outputs) in graphs.items():
        config = {"name": name, "stages": stages, "outputs": outputs}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return [str(folder / f"{name}.yaml") for name in graphs]
