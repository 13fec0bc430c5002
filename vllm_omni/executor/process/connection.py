"""One end of a socket pair: whole messages go in and come out, nothing ever waits for the other side.

A frame is its length and number of descriptors, then msgpack of [entries of tensors, segments, lendings returned,
segments forgotten, message]. A segment is lent with every frame that refers to it, until the receiver has let go of all
tensors of that frame in it. Its descriptor comes along the first time. A tensor that stays on its device is lent, too:
it arrives as a FarTensor, and is kept here until the receiver has let go of that.
"""

from __future__ import annotations

import array
import itertools
import os
import socket
import struct
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import msgpack
from torch import Tensor

from vllm_omni.executor.process.parcel import MAX_LENT, Export, Parcel
from vllm_omni.executor.process.segments import Segment, Segments, bytes_of
from vllm_omni.executor.wire.base import MAX_FRAME_BYTES, MAX_ITEMS, WireError
from vllm_omni.executor.wire.codec import decode, encode
from vllm_omni.executor.wire.table import WireTypes
from vllm_omni.executor.wire.tensors import entry_at, far_tensor, unpacked
from vllm_omni.utils.checks import brief

HEADER = struct.Struct("<II")
MAX_LENGTH = MAX_FRAME_BYTES + 2**20
READ_BYTES = 256 * 1024
FAR_ENTRY = 7  # dtype, shape, device, handle, bytes of the allocation, offset, lending
CLOSE_ON_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)


class Connection:
    """Not thread-safe. types: what the messages may hold; may be set anew between two of them."""

    def __init__(self, end: socket.socket, segments: Segments, types: WireTypes) -> None:
        end.setblocking(False)
        self.types = types
        self._end = end
        self._segments = segments
        self._unsent: deque[tuple[memoryview, list[Segment]]] = (
            deque()
        )  # the rest of frames; whose descriptors go along
        self._unread = bytearray()
        self._files: deque[int] = deque()  # descriptors that have come, not asked for yet
        self._numbers = itertools.count()
        self._lent: dict[int, tuple[Segment | None, Any]] = {}  # lendings that the other side has not returned
        self._sent: set[int] = set()  # segments that the other side knows, by our number
        self._mapped: dict[int, Segment] = {}  # the other side's segments, by its number
        self._returned: deque[int] = deque()  # lendings that nobody here uses any more; any thread adds to them
        self.is_closed = False  # nothing more will come

    @property
    def file(self) -> int:
        """For whoever waits until something can be read or written."""
        return self._end.fileno()

    @property
    def has_unsent(self) -> bool:
        return bool(self._unsent)

    @property
    def has_frame(self) -> bool:
        """Whether `take` has something to look at; it may be no message."""
        behind_header = len(self._unread) - HEADER.size
        return behind_header >= 0 and behind_header >= HEADER.unpack_from(self._unread)[0]

    @property
    def num_lent(self) -> int:
        """Lendings that the other side has not returned."""
        return len(self._lent)

    def send(self, message: object, export: Export = lambda tensor: None) -> None:
        """Puts a message on its way; WireError, and nothing is sent, for what cannot be. export: see Parcel."""
        parcel = Parcel(self._segments, export)
        body = encode(message, parcel.put, self.types)
        entries, lent = parcel.pack()
        for entry, tensor in parcel.far:
            number = next(self._numbers)
            self._lent[number] = (None, tensor)
            entry.append(number)
        self._queue(entries, lent, body)
        self.flush()

    def flush(self) -> None:
        """Sends what can be sent now, also what was returned and forgotten meanwhile."""
        if self._returned:
            self._queue([], [], b"")
        try:
            while self._unsent and not self.is_closed:
                self._send_some()
        except (BlockingIOError, InterruptedError):
            return
        except OSError:  # the other side is gone; what it has sent is still to be read
            self._unsent.clear()

    def receive(self) -> list[Any]:
        """All messages that are here; WireError for what is none, after which nothing can be read any more."""
        self.read()
        found: list[Any] = []
        while (message := self.take()) is not None:
            found.append(message)
        return found

    def read(self) -> None:
        """Reads what is here, for `take`."""
        while not self.is_closed:
            try:
                content, notes, flags, _ = self._end.recvmsg(READ_BYTES, _ROOM_FOR_FILES, CLOSE_ON_EXEC)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                content, notes, flags = b"", [], 0
            self._take_files(notes)
            if flags & socket.MSG_CTRUNC:
                raise WireError("got more descriptors than could be taken")
            if not content:
                self.is_closed = True
            self._unread += content
            if len(content) < READ_BYTES:
                break

    def take(self) -> Any:
        """The next message of what was read; None where no more is whole. WireError for what is none."""
        while len(self._unread) >= HEADER.size:
            length, num_files = HEADER.unpack_from(self._unread)
            if length > MAX_LENGTH or num_files > MAX_LENT:
                raise WireError(f"got a frame of {length} bytes and {num_files} descriptors, expected a message")
            if len(self._unread) < HEADER.size + length:
                break
            content = bytes(memoryview(self._unread)[HEADER.size : HEADER.size + length])
            del self._unread[: HEADER.size + length]
            if len(self._files) < num_files:
                raise WireError(f"got {len(self._files)} descriptors, expected {num_files}")
            message = self._opened(content, [self._files.popleft() for _ in range(num_files)])
            if message is not None:
                return message
        return None

    def close(self) -> None:
        """Lets go of the socket and of all that was lent; tensors that were received live on."""
        self.is_closed = True
        self._end.close()
        for segment, kept in self._lent.values():
            if segment is not None and kept is None:
                self._segments.give_back(segment)
        while self._files:
            os.close(self._files.popleft())
        self._lent.clear()
        self._mapped.clear()
        self._unsent.clear()

    def _queue(self, entries: list[Any], lent: list[tuple[Segment, Any]], body: bytes) -> None:
        told, files = [], []
        for segment, kept in lent:
            number = next(self._numbers)
            self._lent[number] = (segment, kept)
            if segment.number not in self._sent:
                files.append(segment)
            told.append([number, segment.number, segment.num_bytes, segment.number not in self._sent])
            self._sent.add(segment.number)
        returned = [self._returned.popleft() for _ in range(min(len(self._returned), MAX_ITEMS))]
        forgotten = [number for number in self._sent if not self._segments.is_known(number)][:MAX_ITEMS]
        self._sent.difference_update(forgotten)
        content = msgpack.packb([entries, told, returned, forgotten, body])
        self._unsent.append((memoryview(HEADER.pack(len(content), len(files)) + content), files))

    def _send_some(self) -> None:
        rest, files = self._unsent[0]
        notes = []
        if files:
            numbers = array.array("i", [segment.file for segment in files])
            notes.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers))
        num_sent = self._end.sendmsg([rest], notes, NO_SIGNAL)
        if num_sent == len(rest):
            self._unsent.popleft()
        else:
            self._unsent[0] = (rest[num_sent:], [])

    def _take_files(self, notes: list[Any]) -> None:
        for level, kind, content in notes:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(content[: len(content) - len(content) % numbers.itemsize])
                self._files.extend(numbers)

    def _opened(self, content: bytes, files: list[int]) -> Any:
        """The message of a frame; None where it brings none."""
        try:
            plain = msgpack.unpackb(content, max_array_len=MAX_ITEMS + 1, max_ext_len=0)
            entries, lent, returned, forgotten, body = plain
            memories = [self._lending(files, *each) for each in lent]
            for number in returned:
                self._take_back(number)
            for number in forgotten:
                self._mapped.pop(number, None)
        except WireError:
            raise
        except Exception as error:
            raise WireError(f"got a frame that is none ({type(error).__name__}: {error})") from error
        finally:
            for file in files:
                os.close(file)
        if not body:
            return None
        return decode(body, lambda index: self._tensor(entry_at(entries, index), memories), self.types)

    def _tensor(self, entry: Any, memories: list[Callable[[], Tensor]]) -> Tensor:
        if not isinstance(entry, list) or len(entry) != FAR_ENTRY:
            return unpacked(entry, memories)
        tensor = far_tensor(entry[:-1], lambda: self.is_closed)
        weakref.finalize(tensor, _return, self._returned, entry[-1], None).atexit = False
        return tensor

    def _take_back(self, number: int) -> None:
        segment, kept = self._lent.pop(number)
        if segment is not None and kept is None:
            self._segments.give_back(segment)

    def _lending(self, files: list[int], number: int, name: int, num_bytes: int, is_new: bool) -> Callable[[], Tensor]:
        """Memory uint8 [n] that is lent for one frame: when no tensor of it is left, that is told."""
        if is_new:
            self._mapped[name] = self._segments.map(files.pop(0), num_bytes)
        segment = self._mapped.get(name)
        if segment is None:
            raise WireError(f"got a tensor in the segment {brief(name)}, which nobody has sent")
        view = segment.view()
        # the segment lives as long as the view, so that the tensor can be passed on
        weakref.finalize(view, _return, self._returned, number, segment).atexit = False
        memory = bytes_of(segment, view)
        return lambda: memory


_ROOM_FOR_FILES = socket.CMSG_SPACE(MAX_LENT * array.array("i").itemsize)


def _return(returned: deque[int], number: int, segment: Segment | None) -> None:
    returned.append(number)
