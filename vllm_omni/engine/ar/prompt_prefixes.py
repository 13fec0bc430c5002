"""Hashes of the beginnings of a prompt, by which a router finds a replica that has seen them. A false match only sends
a task to the wrong replica; blocks of the KV pool are found otherwise.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

MAX_PREFIXES = 10


def prefix_hashes(token_ids: Sequence[int], block_size: int, salt: Hashable = None) -> tuple[int, ...]:
    """Of the first block, the first two, four, ..., as long as they are whole and not the whole prompt, whose last
    token is computed in any case. salt: what makes the same tokens another content.
    """
    lengths = (block_size << doubling for doubling in range(MAX_PREFIXES))
    return tuple(hash((salt, *token_ids[:length])) for length in lengths if length < len(token_ids))
