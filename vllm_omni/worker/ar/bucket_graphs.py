"""Work on the first rows of fixed tensors, captured once for each of some numbers of rows. Knows no model."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from collections.abc import Sequence as Many

from vllm_omni.utils.device import StepGraphs

SMALL_BUCKETS = (1, 2, 4, 8)
BUCKET_STEP = 16
COARSE_FROM, COARSE_STEP = 256, 128  # many rows cost so much each that padding by a few is cheap


class BucketGraphs:
    """Captured when they are made, the largest first: the others fit into its memory."""

    def __init__(self, graphs: StepGraphs, sizes: Many[int], work: Callable[[int], Callable[[], None]]) -> None:
        """sizes: ascending. work: what is to be captured for so many rows."""
        self._sizes = tuple(sizes)
        self._replay = {size: graphs.capture(work(size)) for size in reversed(sizes)}

    def replay(self, num_rows: int) -> None:
        """The work of the smallest size that has so many rows."""
        self._replay[self._sizes[bisect_left(self._sizes, num_rows)]]()


def bucket_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Numbers of rows, ascending, the last at least max_num_seqs."""
    sizes = list(SMALL_BUCKETS)
    while sizes[-1] < max_num_seqs:
        step = BUCKET_STEP if sizes[-1] < COARSE_FROM else COARSE_STEP
        sizes.append((sizes[-1] // step + 1) * step)
    return tuple(size for index, size in enumerate(sizes) if index == 0 or sizes[index - 1] < max_num_seqs)
