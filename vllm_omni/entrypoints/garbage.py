"""How often a process of ours looks for garbage: seldom while it imports and loads what stays, then as Python does, and
no more at its end.
"""

from __future__ import annotations

import gc

USUAL = gc.get_threshold()
WHILE_LOADING = 100_000  # new objects between two looks, instead of hundreds


def look_seldom() -> None:
    """Else a sixth of a start goes into looking through half a million objects, none of which is garbage."""
    gc.set_threshold(WHILE_LOADING, *USUAL[1:])


def keep_what_is_there() -> None:
    """What is there now stays: half a million objects, which the collector need not look at now and then, with all
    threads stopped for a quarter of a second.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*USUAL)


def look_no_more() -> None:
    """As a program ends: else the interpreter looks through all that is there, several times, before it lets go of it,
    which is a fifth of the time of a command that draws one picture.
    """
    gc.freeze()
