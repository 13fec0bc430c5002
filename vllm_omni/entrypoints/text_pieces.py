"""The pieces of a request's text on their way from the caller's iterator: read as they come, in a thread of their own,
so that whoever waits for the next word holds up no sound. `asyncio` callers have tasks for that.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator

from vllm_omni.engine.boundary import describe
from vllm_omni.errors import InvalidRequestError, OmniError
from vllm_omni.request import OmniRequest

MAX_AHEAD = 64  # pieces of a text that are read and not taken


def without_pieces(request: OmniRequest) -> OmniRequest:
    """What stages are told: that there are some."""
    return request if request.pieces is None else dataclasses.replace(request, pieces=None)


def plain_pieces(request: OmniRequest) -> Iterator[str] | None:
    """Those of a caller in a thread; InvalidRequestError for others."""
    _check_given(request)
    if request.pieces is not None and not isinstance(request.pieces, Iterator):
        raise InvalidRequestError("prompt: got an asynchronous iterator, expected a plain one here; or use AsyncOmni")
    return request.pieces


def async_pieces(request: OmniRequest) -> AsyncIterator[str] | None:
    """Those of an asyncio caller; InvalidRequestError for others, which would hold up the event loop."""
    _check_given(request)
    if request.pieces is not None and not isinstance(request.pieces, AsyncIterator):
        raise InvalidRequestError("prompt: got a plain iterator, expected an asynchronous one here; or use Omni")
    return request.pieces


def checked_piece(piece: object) -> str:
    if not isinstance(piece, str):
        raise InvalidRequestError(f"prompt: got a piece that is a {type(piece).__name__}, expected a string")
    return piece


def broken_text(error: BaseException) -> OmniError:
    """What ends a request whose iterator raised."""
    if isinstance(error, OmniError):
        return error
    wrong = InvalidRequestError(f"prompt: its text in pieces broke off, the iterator raised {describe(error)}")
    wrong.__cause__ = error
    return wrong


def _check_given(request: OmniRequest) -> None:
    """Nobody here could bring a text later."""
    if request.is_open and request.pieces is None:
        raise InvalidRequestError("is_open: got true without pieces, expected the iterator of the text in `pieces`")


class PieceThread:
    """notify: is called, in the thread, when something has come."""

    def __init__(self, pieces: Iterator[str], notify: Callable[[], None]) -> None:
        self._pieces = pieces
        self._notify = notify
        self._arrived: queue.Queue[str | OmniError | None] = queue.Queue(MAX_AHEAD)
        self._is_stopped = False
        threading.Thread(target=self._read, name="omni-pieces", daemon=True).start()

    def take(self) -> list[str | OmniError | None]:
        """What has come since: pieces, then None at their end, or what broke them off."""
        taken: list[str | OmniError | None] = []
        while not self._arrived.empty():
            taken.append(self._arrived.get_nowait())
        return taken

    def stop(self) -> None:
        """Reads no more once the iterator has given the piece that it may be at; never waits for it."""
        self._is_stopped = True
        self.take()

    def _read(self) -> None:
        end: OmniError | None = None
        try:
            self._read_all()
        except BaseException as error:  # whatever it is, the request would wait for the rest of its text
            end = broken_text(error)
        if not self._is_stopped:
            self._put(end)

    def _read_all(self) -> None:
        try:
            for piece in self._pieces:
                if self._is_stopped:
                    break
                self._put(checked_piece(piece))
        finally:
            if isinstance(self._pieces, Generator):
                self._pieces.close()

    def _put(self, item: str | OmniError | None) -> None:
        self._arrived.put(item)
        self._notify()
