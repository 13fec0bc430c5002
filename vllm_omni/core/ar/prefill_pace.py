"""How many tokens of prompts a step may have beside running texts, so that these wait no longer than is stated. Learned
from the steps before; what they took is an argument.
"""

from __future__ import annotations

LEAST_TOKENS = 16  # of prompts in any step: few cost hardly more than none, and a prompt must come to its end
NEWEST = 0.5  # weight of the newest step in what is known


class PrefillPace:
    """Of one model on one machine. A step that was too long makes the next ones shorter, and the other way round: how
    long a token takes depends on the length of its sequence, too.
    """

    def __init__(self, max_wait_s: float) -> None:
        self._max_wait_s = max_wait_s
        self._token_s: float | None = None

    def prompt_tokens(self, num_running: int) -> int | None:
        """Tokens of prompts in a step in which this many sequences write; None while nothing is known."""
        if self._token_s is None:
            return None
        return max(int(self._max_wait_s / self._token_s) - num_running, LEAST_TOKENS)

    def learn(self, num_tokens: int, step_s: float) -> None:
        """What a step with prompts has taken."""
        newest = max(step_s, 1e-9) / num_tokens
        self._token_s = newest if self._token_s is None else self._token_s + NEWEST * (newest - self._token_s)
