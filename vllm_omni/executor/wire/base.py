"""What is said in front of every value that msgpack does not know, how much may be read, and the error for the rest."""

from __future__ import annotations

import enum

from vllm_omni.errors import StageError

MAX_FRAME_BYTES = 64 * 2**20  # of one message, without its tensors
MAX_DEPTH = 100
MAX_ITEMS = 4096  # of one msgpack array, for which a reader sets memory aside; longer lists are written in pieces
INLINE_BYTES = 32 * 1024  # the largest bytes that stand in the message itself


class WireError(StageError):
    """A value that cannot be sent, or bytes that are no message."""


class Tag(enum.IntEnum):
    """The first item of every msgpack array; a msgpack map is a dict whose keys are strings."""

    LIST = 0
    TUPLE = 1
    SET = 2
    FROZENSET = 3
    DICT = 4  # keys and values in turn
    LONG = 5  # the tag of a collection, and its items in pieces, each a LIST
    INTEGERS = 6  # LIST or TUPLE, and int64 in little-endian order
    BIG_INTEGER = 7  # in hexadecimal digits
    BYTES = 8  # what `put` said of them
    TENSOR = 9  # what `put` said of it
    ARRAY = 10  # numpy: dtype, shape, bytes
    SCALAR = 11  # numpy: dtype, bytes
    PICTURE = 12  # PIL: mode, width, height, bytes, palette, notes
    PATH = 13
    DTYPE = 14  # of torch
    DEVICE = 15  # of torch
    CHOICE = 16  # a member of an enum of the table: its name there, its value
    RECORD = 17  # a dataclass of the table: its name there, its fields
    ERROR = 18  # an exception: name, arguments, attributes, cause, lines of its traceback
