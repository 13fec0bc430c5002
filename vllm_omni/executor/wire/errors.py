"""Exceptions as plain values, and back: by name, with message, attributes, cause and the lines of the traceback.

Those of this package, of Python and torch's for lacking memory keep their class; any other keeps its name.
"""

from __future__ import annotations

import builtins
import traceback
from collections.abc import Callable
from typing import Any

import torch

from vllm_omni import errors
from vllm_omni.executor.wire.base import WireError
from vllm_omni.utils.checks import brief

MAX_LINES = 20_000  # characters of a traceback
MAX_MESSAGE = 10_000
MAX_CAUSES = 8
KNOWN: dict[str, type[BaseException]] = {
    **{name: kind for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, Exception)},
    **{name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)},
    "WireError": WireError,
    "OutOfMemoryError": torch.OutOfMemoryError,
}
Plain = Callable[[Any], Any]


class RemoteTraceback(Exception):
    """The lines of a traceback that was made in another process; stands at the end of the causes."""


class RemoteError(Exception):
    """An exception of a class that is not known here; a subclass carries its name."""


def plain_error(error: BaseException, plain: Plain) -> list[Any]:
    """name, message, attributes, cause, lines."""
    chain = _causes(error)
    lines = "".join(traceback.format_exception(error))[-MAX_LINES:]
    below: Any = None
    for each in reversed(chain):
        below = [type(each).__name__, _message(each), _attributes(each), below]
    return [plain(below), lines]


def read_error(chain: Any, lines: Any) -> BaseException:
    """The error, whose last cause is a RemoteTraceback."""
    if not isinstance(lines, str):
        raise WireError(f"got {brief(lines)} for the lines of a traceback")
    links = []
    while chain is not None:
        name, message, attributes, chain = chain
        links.append(_made(name, message, attributes))
        if len(links) > MAX_CAUSES:
            raise WireError(f"got an error of more than {MAX_CAUSES} causes")
    if not links:
        raise WireError("got an error without a name")
    for error, cause in zip(links, [*links[1:], RemoteTraceback(lines)], strict=True):
        error.__cause__ = cause
    return links[0]


def _made(name: Any, message: Any, attributes: Any) -> BaseException:
    if not isinstance(name, str) or not name.isidentifier() or len(name) > 100 or not isinstance(message, str):
        raise WireError(f"got an error of the name {brief(name)} and the message {brief(message)}")
    kind: type[BaseException] = KNOWN.get(name) or type(name, (RemoteError,), {})
    error = kind.__new__(kind)  # whatever its constructor would ask for
    error.args = (message,) if message else ()
    for attribute, value in attributes.items():
        setattr(error, attribute, value)
    return error


def _causes(error: BaseException) -> list[BaseException]:
    """The error, and those that it was raised from; lines of another process are not sent on as a cause."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and len(chain) < MAX_CAUSES and not isinstance(link, RemoteTraceback):
        chain.append(link)
        link = link.__cause__
    return chain


def _message(error: BaseException) -> str:
    if len(error.args) == 1 and isinstance(error.args[0], str):
        return error.args[0][:MAX_MESSAGE]  # str() of a KeyError puts it into quotes
    try:
        return str(error)[:MAX_MESSAGE]
    except Exception:
        return ""


def _attributes(error: BaseException) -> dict[str, Any]:
    """Its own numbers and words, such as when to ask again."""
    given = vars(error) if isinstance(error, errors.OmniError) else {}
    plain = (bool, int, float, str)
    return {name: value for name, value in given.items() if type(value) in plain and not name.startswith("__")}
