"""What may be set of the server itself. What a model may do is its config's matter."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vllm_omni.errors import ConfigError
from vllm_omni.utils.checks import check_number

MIB = 1024**2
MIN_KEY_LENGTH = 8


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Checked when made: ConfigError with the flag, what it got, what was expected."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    no_auth: bool = False  # other machines may reach it without a key
    cors_origins: Sequence[str] = ()  # browsers of these sites may call it
    media_hosts: Sequence[str] = ()  # http(s) inputs may come from these; else they must stand in the request
    max_media_mb: float = 64.0  # of one input that is fetched
    max_body_mb: float = 64.0
    max_connections: int = 1_000
    request_timeout_s: float = 600.0  # the deadline of a request, and the longest that one may ask for
    body_timeout_s: float = 30.0  # the longest that a client may keep its request's next bytes back
    write_timeout_s: float = 60.0  # the longest that a client may leave its answer unread
    drain_s: float = 30.0  # after SIGTERM: what runs may take so long to end
    keep_alive_s: float = 15.0  # between signs of life in an event stream that has nothing to say
    files: Path | None = None  # the folder of finished jobs; None: a temporary one, deleted at the end
    max_jobs: int = 256  # that are kept, finished ones included
    job_lifetime_s: float = 3_600.0  # after which a finished job goes
    embed_prompt: bool = False  # whether files carry the prompt that made them, besides seed and parameters
    otel: str | None = None  # where OpenTelemetry spans go: an OTLP collector, http://host:4318/v1/traces
    ui: bool = False  # the playground at /
    allow_restart: bool = False  # whoever may call it may restart stages, and so let all wait

    def __post_init__(self) -> None:
        check_number("--port", self.port, 0, 65_535, integer=True, raises=ConfigError)
        for name in ("max_media_mb", "max_body_mb", "max_connections", "request_timeout_s", "body_timeout_s"):
            check_number(_flag(name), getattr(self, name), 0, above_low=True, raises=ConfigError)
        for name in ("write_timeout_s", "keep_alive_s", "max_jobs", "job_lifetime_s"):
            check_number(_flag(name), getattr(self, name), 0, above_low=True, raises=ConfigError)
        check_number("--drain-s", self.drain_s, 0, raises=ConfigError)
        for key in self.api_keys:
            if len(key) < MIN_KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError(
                    f"--api-key-file: got a key of {len(key)} characters, expected at least {MIN_KEY_LENGTH} "
                    "printable ASCII characters without spaces"
                )
        if not self.api_keys and not self.no_auth and not is_loopback(self.host):
            raise ConfigError(
                f"--host: got {self.host!r}, which other machines can reach, without a key; give --api-key-file FILE, "
                "set VLLM_OMNI_API_KEY, or say --no-auth"
            )

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body_mb * MIB)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
