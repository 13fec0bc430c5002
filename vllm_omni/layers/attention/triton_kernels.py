"""Triton kernels of paged attention, which read keys and values where they stand, through the block table. Knows no
torch.

All of them run `accumulate`: an online softmax over blocks of keys (FlashAttention-2, arXiv 2307.08691). Blocks stand
at multiples of their size in the sequence, and one that a row does not see changes nothing in that row, so that a row's
result depends on its own position and keys alone. Legend: M rows of a program (heads of a group, and tokens), N keys of
a block, D head size, S splits of a sequence's keys.
"""

import triton
import triton.language as tl


@triton.jit
def accumulate(
    query,  # [M, D]
    positions,  # [M], where each row stands in its sequence
    keys,  # pointers to the pool, at the program's head
    values,
    table,  # pointer to the sequence's blocks
    first,  # the first key that any row sees
    start,  # the keys [start, stop), from a multiple of BLOCK_N on
    stop,
    slot_stride,
    scale,  # of scores, for powers of two
    ROWS: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """-> the weighted sum of values [M, D], the largest score [M] and the sum of weights [M], all float32."""
    dims = tl.arange(0, BLOCK_D)
    output = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    peak = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    for base in range(start, stop, BLOCK_N):
        places = base + tl.arange(0, BLOCK_N)
        is_there = (places >= first) & (places < stop)
        blocks = tl.load(table + places // PAGE, mask=is_there, other=0).to(tl.int64)
        offsets = (blocks * PAGE + places % PAGE)[:, None] * slot_stride + dims[None, :]
        mask = is_there[:, None] & (dims[None, :] < HEAD_DIM)
        key = tl.load(keys + offsets, mask=mask, other=0.0)
        value = tl.load(values + offsets, mask=mask, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        is_seen = is_there[None, :] & (places[None, :] <= positions[:, None])
        if WINDOW > 0:
            is_seen = is_seen & (places[None, :] > positions[:, None] - WINDOW)
        scores = tl.where(is_seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        base_score = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a row that has seen no key yet
        weights = tl.exp2(scores - base_score[:, None])
        shrink = tl.exp2(peak - base_score)
        total = total * shrink + tl.sum(weights, 1)
        output = output * shrink[:, None]
        output += tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
        peak = new_peak
    return output, peak, total


@triton.jit
def split_span(length, first, MIN_SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """How the keys [first, length) of a sequence are split, by nothing but themselves -> where the first split begins,
    and the size of each.
    """
    start = first // BLOCK_N * BLOCK_N
    size = tl.cdiv(tl.cdiv(length - start, MAX_SPLITS), BLOCK_N) * BLOCK_N
    return start, tl.maximum(size, MIN_SPLIT)


@triton.jit
def decode_splits(
    query,  # [N, H, D], its rows query_stride apart
    key_cache,  # [blocks, PAGE, K, D]
    value_cache,
    block_table,  # [B, table_stride]
    query_starts,  # [B + 1]
    context_lens,  # [B]
    partial,  # [B, S, H, D] float32
    peaks,  # [B, S, H] float32
    totals,  # [B, S, H] float32
    table_stride,
    query_stride,
    scale,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program for each sequence of one token, key-value head and split; those of other sequences do nothing."""
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token = tl.load(query_starts + sequence)
    if tl.load(query_starts + sequence + 1) - token != 1:
        return
    length = tl.load(context_lens + sequence).to(tl.int32)
    first = tl.maximum(length - WINDOW, 0) if WINDOW > 0 else length * 0
    begin, size = split_span(length, first, MIN_SPLIT, MAX_SPLITS, BLOCK_N)
    start = begin + split * size
    if start >= length:
        return
    rows, dims = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    heads = kv_head * GROUP + rows
    mask = (rows[:, None] < GROUP) & (dims[None, :] < HEAD_DIM)
    at = heads[:, None] * HEAD_DIM + dims[None, :]
    output, peak, total = accumulate(
        tl.load(query + token * query_stride + at, mask=mask, other=0.0),
        tl.full([BLOCK_G], 0, dtype=tl.int32) + (length - 1),
        key_cache + kv_head * HEAD_DIM,
        value_cache + kv_head * HEAD_DIM,
        block_table + sequence.to(tl.int64) * table_stride,
        first,
        start,
        tl.minimum(start + size, length),
        NUM_KV_HEADS * HEAD_DIM,
        scale,
        BLOCK_G,
        PAGE,
        WINDOW,
        HEAD_DIM,
        BLOCK_N,
        BLOCK_D,
        PRECISION,
    )
    place = (sequence.to(tl.int64) * tl.num_programs(2) + split) * NUM_HEADS
    tl.store(partial + place * HEAD_DIM + at, output, mask=mask)
    tl.store(peaks + place + heads, peak, mask=rows < GROUP)
    tl.store(totals + place + heads, total, mask=rows < GROUP)


@triton.jit
def combine_splits(
    output,  # [N, H, D]
    query_starts,
    context_lens,
    partial,
    peaks,
    totals,
    num_places,  # S
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program for each sequence of one token and head: one softmax of the splits that were made, in their order."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    token = tl.load(query_starts + sequence)
    if tl.load(query_starts + sequence + 1) - token != 1:
        return
    length = tl.load(context_lens + sequence).to(tl.int32)
    first = tl.maximum(length - WINDOW, 0) if WINDOW > 0 else length * 0
    begin, size = split_span(length, first, MIN_SPLIT, MAX_SPLITS, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    mask = dims < HEAD_DIM
    combined = tl.zeros([BLOCK_D], dtype=tl.float32)
    peak = tl.full([1], float("-inf"), dtype=tl.float32)
    total = tl.zeros([1], dtype=tl.float32)
    place = sequence.to(tl.int64) * num_places * NUM_HEADS + head
    for _ in range(0, tl.cdiv(length - begin, size)):
        split_peak = tl.load(peaks + place)
        new_peak = tl.maximum(peak, split_peak)
        shrink, weight = tl.exp2(peak - new_peak), tl.exp2(split_peak - new_peak)
        values = tl.load(partial + place * HEAD_DIM + dims, mask=mask, other=0.0)
        combined = combined * shrink + values * weight
        total = total * shrink + tl.load(totals + place) * weight
        peak = new_peak
        place += NUM_HEADS
    result = (combined / total).to(output.dtype.element_ty)
    tl.store(output + (token * NUM_HEADS + head) * HEAD_DIM + dims, result, mask=mask)


@triton.jit(do_not_specialize=["table_stride"])  # another width of the table is no other kernel
def prefill_tiles(
    output,  # [N, H, D]
    query,  # [N, H, D], its rows query_stride apart
    key_cache,
    value_cache,
    block_table,
    query_starts,
    context_lens,
    tiles,  # [T, 2]: a sequence, and the first of its tokens of this step in the tile
    table_stride,
    query_stride,
    scale,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,  # tokens
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program for each tile of tokens and key-value head."""
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    ROWS: tl.constexpr = TILE * BLOCK_G
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    sequence, tile_start = tl.load(tiles + 2 * tile), tl.load(tiles + 2 * tile + 1).to(tl.int32)
    begin, end = tl.load(query_starts + sequence), tl.load(query_starts + sequence + 1)
    num_tokens = (end - begin).to(tl.int32)
    length = tl.load(context_lens + sequence).to(tl.int32)
    tile_position = length - num_tokens + tile_start  # of its first token
    stop = tl.minimum(tile_position + TILE, length)
    first = tl.maximum(tile_position - WINDOW + 1, 0) if WINDOW > 0 else tile_position * 0
    rows, dims = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    tokens, members = tile_start + rows // BLOCK_G, rows % BLOCK_G
    is_row = (tokens < num_tokens) & (members < GROUP)
    mask = is_row[:, None] & (dims[None, :] < HEAD_DIM)
    heads = kv_head * GROUP + members
    at = heads[:, None] * HEAD_DIM + dims[None, :]
    places = (begin + tokens)[:, None]
    states, _, total = accumulate(
        tl.load(query + places * query_stride + at, mask=mask, other=0.0),
        tile_position + rows // BLOCK_G,
        key_cache + kv_head * HEAD_DIM,
        value_cache + kv_head * HEAD_DIM,
        block_table + sequence * table_stride,
        first,
        first // BLOCK_N * BLOCK_N,
        stop,
        NUM_KV_HEADS * HEAD_DIM,
        scale,
        ROWS,
        PAGE,
        WINDOW,
        HEAD_DIM,
        BLOCK_N,
        BLOCK_D,
        PRECISION,
    )
    total = tl.where(is_row, total, 1.0)
    states = (states / total[:, None]).to(output.dtype.element_ty)
    tl.store(output + places * NUM_HEADS * HEAD_DIM + at, states, mask=mask)
