"""Odd requests for a server, as the bytes that go over the wire: bodies, forms, targets and headers."""

from __future__ import annotations

import base64
import io
import json
from random import Random
from typing import Any

import numpy as np
import soundfile
from fuzz.mutation import mutate, mutate_bytes, mutate_text, odd_value
from PIL import Image

METHODS = ["GET", "GET", "GET", "POST", "DELETE", "PUT", "PATCH", "HEAD", "OPTIONS", "TRACE", "X"]
PATHS = [
    *("/health", "/ready", "/metrics", "/v1/models", "/v1/models/words", "/v1/models/words/graph", "/v1/requests"),
    *("/v1/requests/x", "/v1/requests/x/timeline", "/v1/jobs", "/v1/jobs/x", "/v1/jobs/x/content", "/v1/audio/voices"),
    *("/v1/chat/completions", "/v1/audio/voices/x", "/openapi.json", "/docs", "/", "/v1/realtime"),
]
QUERIES = [
    "?limit=5",
    "?limit=-1",
    "?limit=x",
    "?limit=1e9",
    "?after=x",
    "?order=up",
    "?index=9",
    "?index=-1",
    "?model=",
]
ODD_PATHS = ["%00", "%ff%fe", "..%2f..%2fetc%2fpasswd", "../../etc/passwd", "%ED%A0%80", "x" * 9_000, "{}", "'\"<>"]
ODD_NUMBERS = [b"9" * 5_000, b"-0", b"1e999", b"NaN", b"-Infinity", b"1" + b"0" * 400, b"0.1e-400"]
ODD_HEADERS = [
    *(b"authorization: Bearer x", b"authorization: \xff\xfe", b"x-request-id: \x01", b"x-request-id: " + b"x" * 500),
    *(b"timeout: nan", b"timeout: -1", b"timeout: 1e400", b"timeout: 0.01", b"timeout: x", b"traceparent: 00-x"),
    *(
        b"accept-encoding: gzip",
        b"content-encoding: gzip",
        b"expect: 100-continue",
        b"x-timeout-s: 0.2",
        b"range: bytes=0-",
    ),
    *(
        b"content-length: 5",
        b"transfer-encoding: chunked",
        b"upgrade: h2c",
        b"x: " + b"y" * 40_000,
        b"cookie: " + b"a" * 900,
    ),
    *(b"host: evil", b"content-type: text/plain", b"content-type: application/json; charset=utf-16", b"origin: null"),
]


def _png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(file, "PNG")
    return file.getvalue()


def _wav() -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(1_600, np.float32), 16_000, format="WAV")
    return file.getvalue()


PNG, WAV = _png(), _wav()
PNG_URI = "data:image/png;base64," + base64.b64encode(PNG).decode()
WAV_TEXT = base64.b64encode(WAV).decode()
_PARTS: list[Any] = [
    {"type": "text", "text": "draw a red ball"},
    {"type": "image_url", "image_url": {"url": PNG_URI, "detail": "low"}},
    {"type": "input_audio", "input_audio": {"data": WAV_TEXT, "format": "wav"}},
    {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}, "fps": 2},
]
_SAMPLING: dict[str, Any] = {
    **{"n": 2, "seed": 1, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "stop": ["x", "y"]},
    **{"presence_penalty": 0.1, "logit_bias": {"3": 1.0}, "stop_token_ids": [1], "ignore_eos": True, "max_tokens": 4},
    **{"timeout": 4.0, "priority": "high", "user": "me", "stream_options": {"include_usage": True}},
}
BODIES: dict[str, list[Any]] = {
    "/v1/chat/completions": [
        {"model": "words", "messages": [{"role": "user", "content": "hello"}], **_SAMPLING, "stream": True},
        {"model": "words", "messages": [{"role": "user", "content": "hello"}], "logprobs": True, "top_logprobs": 2}
        | {"max_completion_tokens": 3, "n": 2},
        {"model": "tiny-omni", "messages": [{"role": "user", "content": _PARTS}], "max_tokens": 4},
        {"model": "tiny-omni", "messages": [{"role": "user", "content": "draw a red ball"}], "modalities": ["image"]}
        | {"num_inference_steps": 2, "size": "64x64", "partial_images": 1, "stream": True, "extra_params": {"x": 1}},
        {"model": "tiny-speech", "messages": [{"role": "user", "content": "read 3"}], "modalities": ["text", "audio"]}
        | {"audio": {"voice": "Reader", "format": "wav"}, "max_tokens": 8},
    ],
    "/v1/completions": [
        {"model": "words", "prompt": "hello", **_SAMPLING, "logprobs": 2, "stream": True},
        {"model": "words", "prompt": [[5, 6], [7]], "max_tokens": 2, "echo": False, "best_of": 1},
    ],
    "/v1/embeddings": [
        {"model": "vectors", "input": ["a", "b"], "dimensions": 4, "encoding_format": "base64", "pooling": "mean"},
        {"model": "vectors", "input": [[1, 2], [3]]},
    ],
    "/v1/images/generations": [
        {"model": "tiny-omni", "prompt": "a red ball", "n": 1, "size": "64x64", "num_inference_steps": 2, "seed": 3}
        | {"output_format": "jpeg", "output_compression": 50, "partial_images": 2, "stream": True, "guidance_scale": 2},
    ],
    "/v1/audio/speech": [
        {"model": "tiny-speech", "input": "read 3", "voice": "Reader", "response_format": "flac", "speed": 1.5}
        | {"stream_format": "sse", "seed": 1, "task_type": "CustomVoice"},
        {"model": "tiny-speech", "input": "7", "response_format": "pcm"},
    ],
    "/v1/audio/speech/batch": [{"model": "tiny-speech", "items": [{"input": "3"}, {"input": "7", "speed": 2.0}]}],
    "/v1/audio/generate": [
        {"model": "tiny-omni", "prompt": "C4", "duration_s": 0.5, "num_inference_steps": 2, "response_format": "opus"}
        | {"lyrics": "la", "extra_params": {"bpm": 90}},
    ],
    "/v1/jobs": [
        {"model": "tiny-omni", "kind": "image", "prompt": "a ball", "n": 2, "num_inference_steps": 3, "size": "64x64"},
        {"model": "tiny-omni", "kind": "audio", "prompt": "C4", "output_format": "mp3", "num_inference_steps": 2},
    ],
}


def body_bytes(body: Any, random: Random) -> bytes:
    """A body as JSON: as it is, changed as a tree, as text, as bytes, or something else altogether."""
    how = random.random()
    if how > 0.85:
        return json.dumps(body).encode()
    if how < 0.08:
        depth = random.choice([50, 900, 5_000, 100_000])
        return random.choice([b"[" * depth, b'{"messages":' * depth, b"[" * depth + b"]" * depth, b"", b"null", b"[]"])
    if how < 0.15:
        content = json.dumps(body).encode()
        at = [index for index in range(len(content)) if content[index : index + 1].isdigit()]
        place = random.choice(at or [0])
        return content[:place] + random.choice(ODD_NUMBERS) + content[place + 1 :]
    if how < 0.25:
        return mutate_bytes(json.dumps(body).encode(), random)
    if how < 0.35:
        return mutate_text(json.dumps(body), random).encode("utf-8", "surrogatepass")
    ensure_ascii = random.random() < 0.7
    return json.dumps(mutate(body, random), ensure_ascii=ensure_ascii).encode("utf-8", "surrogatepass")


def form_bytes(random: Random) -> tuple[bytes, str]:
    """A form with files, and its content type; fields, files or the form itself are odd."""
    fields = mutate({"model": "tiny-omni", "prompt": "a ball", "n": 1, "size": "64x64", "extra_params": "{}"}, random)
    fields = fields if isinstance(fields, dict) else {"prompt": fields}
    parts = [(f'name="{name}"', _plain(value)) for name, value in fields.items()]
    for _ in range(random.choice([0, 1, 1, 2, 20])):
        name = random.choice(["image", "image[]", "mask", "x", ""])
        content = random.choice([PNG, WAV, b"", mutate_bytes(PNG, random), random.randbytes(1_000), b"\x00" * 2**20])
        filename = random.choice(["a.png", "../../a", "\x00", "x" * 3_000])
        parts.append((f'name="{name}"; filename="{filename}"\r\nContent-Type: image/png', content))
    border = b"--border"
    content = b"".join(
        border
        + b"\r\nContent-Disposition: form-data; "
        + about.encode("utf-8", "replace")
        + b"\r\n\r\n"
        + data
        + b"\r\n"
        for about, data in parts
    )
    content += random.choice([border + b"--\r\n", border + b"--\r\n", b"", border])
    if random.random() < 0.3:
        content = mutate_bytes(content, random)
    kinds = ["multipart/form-data; boundary=border"] * 8 + ["multipart/form-data", "multipart/form-data; boundary="]
    return content, random.choice([*kinds, "application/x-www-form-urlencoded", "application/json"])


def odd_target(random: Random) -> tuple[str, str]:
    """(method, target)."""
    path = random.choice(PATHS)
    if random.random() < 0.4:
        path = path.rpartition("/")[0] + "/" + random.choice(ODD_PATHS)
    query = random.choice(["", *QUERIES, "?" + "a=b&" * 500, "?limit=%00&x=%ff"])
    return random.choice(METHODS), path + query


def head(method: str, target: str, random: Random, length: int, kind: str = "application/json") -> bytes:
    """Request line and headers, some of them odd; the connection ends with the answer."""
    lines = [f"{method} {target} HTTP/1.1".encode(), b"host: x", b"connection: close"]
    if length or method == "POST":
        lines += [b"content-type: " + kind.encode(), b"content-length: " + str(length).encode()]
    if random.random() < 0.15:
        lines += random.sample(ODD_HEADERS, random.choice([1, 1, 2]))
    if random.random() < 0.01:
        lines += [b"x-%d: y" % number for number in range(2_000)]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def odd_event(event: Any, random: Random) -> str | bytes:
    """An event of a WebSocket, changed somewhere."""
    how = random.random()
    if how < 0.5:
        return json.dumps(event)
    if how < 0.8:
        return json.dumps(mutate(event, random))
    if how < 0.9:
        return mutate_text(json.dumps(event), random).encode("utf-8", "replace").decode()
    values = [odd_value(random), odd_value(random)]
    return random.choice([b"bytes", b"", "", "[" * 50_000, json.dumps(values), '{"type":' + "9" * 5_000 + "}"])


def _plain(value: Any) -> bytes:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode("utf-8", "surrogatepass")
