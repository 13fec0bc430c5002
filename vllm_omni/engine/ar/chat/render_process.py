"""The process in which chat templates run. It reads requests, one line of JSON each, and answers in the same way.

The system ends it when a template takes more processor time than it may, and refuses it more memory: no code of ours
has to be reached for that. Where a system has no such limits, its parent ends it. It ends by itself with its parent.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from typing import Any

from jinja2 import Template

from vllm_omni.engine.ar.chat.environment import make_environment

MAX_ERROR_CHARS = 500


class TooLongError(Exception):
    """A template writes more than anyone could use."""


def main(max_cpu_s: float, max_memory_bytes: int, max_chars: int) -> None:
    """Answers until its input ends. max_cpu_s, max_chars: of one rendering. max_memory_bytes: of this process."""
    _limit_memory(max_memory_bytes)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        _limit_time(max_cpu_s)
        answer = json.dumps(_answer(request["template"], request["values"], max_chars))
        _limit_time(0)
        sys.stdout.buffer.write(answer.encode() + b"\n")
        sys.stdout.buffer.flush()


def _limit_memory(max_bytes: int) -> None:
    """And no core dumps. Some systems have no such limits, others refuse this one."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        for limit, most in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_AS, max_bytes)):
            hard = resource.getrlimit(limit)[1]
            allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(limit, (allowed, allowed))


def _limit_time(max_cpu_s: float) -> None:
    """From now on; 0 lifts it."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, max_cpu_s)


def _answer(template: str, values: dict[str, Any], max_chars: int) -> dict[str, str]:
    try:
        return {"text": "".join(_bounded(_compiled(template).generate(values), max_chars))}
    except TooLongError:
        return {"limit": f"writes more than {max_chars} characters"}
    except MemoryError:
        return {"limit": "needs more memory than it may have"}
    except Exception as error:  # a template may raise anything over messages that it does not like
        return {"error": str(error)[:MAX_ERROR_CHARS] or type(error).__name__}


def _bounded(pieces: Iterator[str], max_chars: int) -> Iterator[str]:
    num_chars = 0
    for piece in pieces:
        num_chars += len(piece)
        if num_chars > max_chars:
            raise TooLongError
        yield piece


@lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    return make_environment().from_string(template)
