"""Which of many strings ends first in a text that grows symbol by symbol. Knows no tokens and no sampling.

An automaton after Aho and Corasick (1975): a state is the longest end of the text that begins some string, so that a
symbol costs the same however many strings there are, and however long they are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Symbol = str | int  # one character, or a token that stands for itself and is no part of the text


@dataclass(slots=True)
class State:
    """One beginning of a string."""

    num_chars: int = 0  # its characters
    children: dict[Symbol, int] = field(default_factory=dict)
    shorter: int = 0  # the longest proper end of it that is a beginning, too
    ending: int | None = None  # characters of the longest string that ends with it
    held: int = 0  # characters of the longest end of it that a string goes on from


class StopStrings:
    """An automaton over some strings; 0 is the state of an empty text."""

    def __init__(self, strings: Iterable[Sequence[Symbol]]) -> None:
        self._states = [State()]
        for string in strings:
            self._add(string)
        self._link()

    def advance(self, state: int, symbol: Symbol) -> int:
        """The state after one more symbol."""
        states = self._states
        while state and symbol not in states[state].children:
            state = states[state].shorter
        return states[state].children.get(symbol, 0)

    def ending(self, state: int) -> int | None:
        """Characters of the longest string that ends here, None where none does."""
        return self._states[state].ending

    def held(self, state: int) -> int:
        """Characters at the end of the text that a string may yet go on from."""
        return self._states[state].held

    def _add(self, string: Sequence[Symbol]) -> None:
        number = 0
        for symbol in string:
            children = self._states[number].children
            if symbol not in children:
                children[symbol] = len(self._states)
                self._states.append(State(self._states[number].num_chars + isinstance(symbol, str)))
            number = children[symbol]
        self._states[number].ending = self._states[number].num_chars

    def _link(self) -> None:
        """Fills what depends on shorter states, from these to longer ones."""
        waiting = deque(self._states[0].children.values())
        while waiting:
            state = self._states[waiting.popleft()]
            shorter = self._states[state.shorter]
            state.ending = shorter.ending if state.ending is None else state.ending
            state.held = state.num_chars if state.children else shorter.held
            for symbol, number in state.children.items():
                self._states[number].shorter = self.advance(state.shorter, symbol)
                waiting.append(number)
