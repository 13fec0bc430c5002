"""The kernels, a program for each row or for some heads of a token. Knows no torch.

Each rounds where the operations of torch that it stands for round, so that low precision comes out the same but for the
order in which a mean is added up. Legend: D width of a row, d head size.
"""

import triton
import triton.language as tl


@triton.jit
def normed(
    values,  # [..., BLOCK] float32, zeros behind WIDTH
    weight,  # [BLOCK] float32
    is_inside,  # [..., BLOCK]
    epsilon,
    WIDTH: tl.constexpr,
    IS_CENTRED: tl.constexpr,  # LayerNorm without weights; else RMSNorm, rounded before its weight acts
    DTYPE: tl.constexpr,
):
    """Over the last axis -> float32 of numbers that DTYPE has."""
    if IS_CENTRED:
        mean = tl.sum(values, -1, keep_dims=True) / WIDTH
        values = tl.where(is_inside, values - mean, 0.0)
    scale = tl.math.rsqrt(tl.sum(values * values, -1, keep_dims=True) / WIDTH + epsilon)
    values = (values * scale).to(DTYPE).to(tl.float32)
    if not IS_CENTRED:
        values = (values * weight).to(DTYPE).to(tl.float32)
    return values


@triton.jit(do_not_specialize=["rows_per_sample"])
def norm_rows(
    out,
    total,  # of x and update, where it is wanted
    x,
    update,
    weight,  # [D]
    scale,  # a row [D] for each sample
    shift,
    rows_per_sample,
    x_stride,
    update_stride,
    scale_stride,
    shift_stride,
    epsilon,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_CENTRED: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
):
    """norm(x + update) * (1 + scale) + shift."""
    row = tl.program_id(0).to(tl.int64)
    sample = row // rows_per_sample
    columns = tl.arange(0, BLOCK)
    is_inside = columns < WIDTH
    dtype = out.dtype.element_ty
    values = tl.load(x + row * x_stride + columns, mask=is_inside, other=0.0).to(tl.float32)
    if HAS_UPDATE:
        values += tl.load(update + row * update_stride + columns, mask=is_inside, other=0.0).to(tl.float32)
        tl.store(total + row * WIDTH + columns, values.to(dtype), mask=is_inside)
        values = values.to(dtype).to(tl.float32)
    weights = values
    if not IS_CENTRED:
        weights = tl.load(weight + columns, mask=is_inside, other=0.0).to(tl.float32)
    values = normed(values, weights, is_inside, epsilon, WIDTH, IS_CENTRED, dtype)
    if HAS_SCALE:
        scales = tl.load(scale + sample * scale_stride + columns, mask=is_inside, other=0.0).to(tl.float32)
        if HAS_SHIFT:
            shifts = tl.load(shift + sample * shift_stride + columns, mask=is_inside, other=0.0).to(tl.float32)
            values = shifts + values * (1.0 + scales).to(dtype).to(tl.float32)
        else:
            values += values * scales
    tl.store(out + row * WIDTH + columns, values.to(dtype), mask=is_inside)


@triton.jit(do_not_specialize=["rows_per_sample"])
def gate_rows(
    out,
    x,
    update,
    gate,  # a row [D] for each sample
    weight,
    rows_per_sample,
    x_stride,
    update_stride,
    gate_stride,
    epsilon,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_CENTRED: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_GATE: tl.constexpr,
):
    """x + gate * norm(update)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_inside = columns < WIDTH
    dtype = out.dtype.element_ty
    updates = tl.load(update + row * update_stride + columns, mask=is_inside, other=0.0).to(tl.float32)
    if HAS_NORM:
        weights = updates
        if not IS_CENTRED:
            weights = tl.load(weight + columns, mask=is_inside, other=0.0).to(tl.float32)
        updates = normed(updates, weights, is_inside, epsilon, WIDTH, IS_CENTRED, dtype)
    if HAS_GATE:
        sample = row // rows_per_sample
        updates *= tl.load(gate + sample * gate_stride + columns, mask=is_inside, other=0.0).to(tl.float32)
    updates += tl.load(x + row * x_stride + columns, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + columns, updates.to(dtype), mask=is_inside)


@triton.jit
def swiglu_rows(out, gate_up, width, BLOCK: tl.constexpr):
    """silu(gate) * up, of rows [2 D]; a program for BLOCK columns of a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < width
    dtype = out.dtype.element_ty
    start = gate_up + row * 2 * width
    gate = tl.load(start + columns, mask=is_inside, other=0.0).to(tl.float32)
    up = tl.load(start + width + columns, mask=is_inside, other=0.0).to(tl.float32)
    gate = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out + row * width + columns, (gate * up).to(dtype), mask=is_inside)


@triton.jit
def scaled_heads(
    values,  # [heads, d / 2] float32
    scale,  # [heads, 1]
    query_weight,  # pointers to the weights of these dimensions
    key_weight,
    is_query,  # [heads, 1]
    is_inside,  # [d / 2]
    DTYPE: tl.constexpr,
):
    """By the norm of each head, then by the weights of queries or keys; each product rounded."""
    values = (values * scale).to(DTYPE).to(tl.float32)
    of_queries = tl.load(query_weight, mask=is_inside, other=0.0).to(tl.float32)
    of_keys = tl.load(key_weight, mask=is_inside, other=0.0).to(tl.float32)
    values *= tl.where(is_query, of_queries[None, :], of_keys[None, :])
    return values.to(DTYPE).to(tl.float32)


@triton.jit(do_not_specialize=["num_places"])
def place_heads(
    heads,  # [rows, at least NUM_HEADS + NUM_KV_HEADS heads of d], written in place
    query_weight,  # [d]
    key_weight,
    cos,  # [places, d / 2], elements `turn_stride` apart
    sin,
    row_stride,
    num_places,  # row i stands at i % num_places
    place_stride,
    turn_stride,
    query_epsilon,
    key_epsilon,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,  # d / 2
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    ARE_NEIGHBOURS: tl.constexpr,  # the two parts of a number; else they are in the halves of a head
    ROUNDS_PRODUCTS: tl.constexpr,  # each product as language models do; else only the result
):
    """Norms queries and keys head by head, then turns them."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    half = tl.arange(0, BLOCK_D)
    is_inside = (head[:, None] < NUM_HEADS + NUM_KV_HEADS) & (half[None, :] < HALF)
    dtype = heads.dtype.element_ty
    start = heads + row * row_stride + head[:, None] * (2 * HALF)
    if ARE_NEIGHBOURS:
        first, second = 2 * half, 2 * half + 1
        dims = tl.arange(0, 2 * BLOCK_D)
        is_pair = (head[:, None] < NUM_HEADS + NUM_KV_HEADS) & (dims[None, :] < 2 * HALF)
        pairs = tl.load(start + dims[None, :], mask=is_pair, other=0.0).to(tl.float32)
        real, imaginary = tl.split(tl.reshape(pairs, [BLOCK_H, BLOCK_D, 2]))
    else:
        first, second = half, half + HALF
        real = tl.load(start + first[None, :], mask=is_inside, other=0.0).to(tl.float32)
        imaginary = tl.load(start + second[None, :], mask=is_inside, other=0.0).to(tl.float32)
    if HAS_NORMS:
        is_query = head[:, None] < NUM_HEADS
        square = tl.sum(real * real + imaginary * imaginary, 1, keep_dims=True) / (2 * HALF)
        scale = tl.math.rsqrt(square + tl.where(is_query, query_epsilon, key_epsilon))
        real = scaled_heads(real, scale, query_weight + first, key_weight + first, is_query, half < HALF, dtype)
        imaginary = scaled_heads(
            imaginary, scale, query_weight + second, key_weight + second, is_query, half < HALF, dtype
        )
    turn = (row % num_places) * place_stride + half * turn_stride
    cosine = tl.load(cos + turn, mask=half < HALF, other=0.0).to(tl.float32)[None, :]
    sine = tl.load(sin + turn, mask=half < HALF, other=0.0).to(tl.float32)[None, :]
    if ROUNDS_PRODUCTS:
        new_real = (real * cosine).to(dtype).to(tl.float32) - (imaginary * sine).to(dtype).to(tl.float32)
        new_imaginary = (imaginary * cosine).to(dtype).to(tl.float32) + (real * sine).to(dtype).to(tl.float32)
    else:
        new_real = real * cosine - imaginary * sine
        new_imaginary = real * sine + imaginary * cosine
    if ARE_NEIGHBOURS:
        pairs = tl.reshape(tl.join(new_real, new_imaginary), [BLOCK_H, 2 * BLOCK_D])
        tl.store(start + dims[None, :], pairs.to(dtype), mask=is_pair)
    else:
        tl.store(start + first[None, :], new_real.to(dtype), mask=is_inside)
        tl.store(start + second[None, :], new_imaginary.to(dtype), mask=is_inside)


@triton.jit
def store_rows(
    key_cache,  # [slots, WIDTH]
    value_cache,
    key,  # [rows, WIDTH]
    value,
    slots,  # [rows] int64
    key_stride,
    value_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Keys and values to their slots of the pool; a program for BLOCK numbers of a row of either."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < WIDTH
    place = tl.load(slots + row) * WIDTH + columns
    tl.store(key_cache + place, tl.load(key + row * key_stride + columns, mask=is_inside), mask=is_inside)
    tl.store(value_cache + place, tl.load(value + row * value_stride + columns, mask=is_inside), mask=is_inside)


@triton.jit
def group_moments(
    means,  # [samples, chunks, GROUPS] float32
    squares,  # as means: the sums of squared distances from them
    x,  # [samples, pixels, WIDTH]
    num_pixels,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Of a chunk of PIXELS pixels; the last of a sample may have fewer."""
    chunk, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    pixels, columns = chunk * PIXELS + tl.arange(0, PIXELS), tl.arange(0, WIDTH)
    is_inside = (pixels < num_pixels)[:, None]
    places = (sample * num_pixels + pixels)[:, None] * WIDTH + columns[None, :]
    values = tl.load(x + places, mask=is_inside, other=0.0).to(tl.float32)
    count = tl.minimum(num_pixels - chunk * PIXELS, PIXELS) * (WIDTH // GROUPS)
    sums = tl.sum(tl.reshape(tl.sum(values, 0), [GROUPS, WIDTH // GROUPS]), 1)
    mean = sums / count
    spread = tl.reshape(tl.broadcast_to(mean[:, None], [GROUPS, WIDTH // GROUPS]), [WIDTH])
    distances = tl.where(is_inside, values - spread[None, :], 0.0)
    square = tl.sum(tl.reshape(tl.sum(distances * distances, 0), [GROUPS, WIDTH // GROUPS]), 1)
    place = (sample * tl.num_programs(0) + chunk) * GROUPS + tl.arange(0, GROUPS)
    tl.store(means + place, mean)
    tl.store(squares + place, square)


@triton.jit
def scale_channels(
    out,
    x,  # [samples, pixels, WIDTH]
    scale,  # [samples, WIDTH] float32
    shift,
    num_pixels,
    WIDTH: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """x * scale + shift, each channel of a sample with its own."""
    chunk, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    pixels, columns = chunk * PIXELS + tl.arange(0, PIXELS), tl.arange(0, WIDTH)
    is_inside = (pixels < num_pixels)[:, None]
    places = (sample * num_pixels + pixels)[:, None] * WIDTH + columns[None, :]
    values = tl.load(x + places, mask=is_inside, other=0.0).to(tl.float32)
    channel = sample * WIDTH + columns
    values = values * tl.load(scale + channel)[None, :] + tl.load(shift + channel)[None, :]
    tl.store(out + places, values.to(out.dtype.element_ty), mask=is_inside)


@triton.jit
def quantize_rows(
    out,  # [N, D] float8
    scales,  # [N] float32
    x,
    x_stride,
    largest_number,  # of float8
    most,  # of float32
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each row by its largest value, which becomes the largest of float8."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_inside = columns < WIDTH
    values = tl.load(x + row * x_stride + columns, mask=is_inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(values), 0)
    inverse = tl.minimum(tl.div_rn(largest_number, largest), most)  # of a row of zeros, too
    tl.store(out + row * WIDTH + columns, (values * inverse).to(out.dtype.element_ty), mask=is_inside)
    tl.store(scales + row, tl.div_rn(largest, largest_number))
