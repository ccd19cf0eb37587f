"""y = x W^T + bias for 1 to 16 rows of x and a packed 4-bit weight W (n, k), float32 accumulation.

v1  a warp a row of W, one code at a time: the kernel that teaches; takes every shape and block size
v2  the levels in shared memory, 16 bytes of codes a load, each block's absmax applied to a sum instead of to values
v3  tensor cores: two codes become two float16 by ONE table lookup, 16 rows of W at once, for up to 8 rows of x in one
    pass over W; the next codes are copied to shared memory while these are multiplied
v4  the same with the codes of several steps under way, as many as shared memory holds: the one in use

All take (x, packed, absmax, codes, group_absmax, offset, code_map, levels, bias, y, rows, n, k, block_shift,
group_shift, nested, has_bias). With `nested`, a block's absmax is code_map[code] * group_absmax + offset.
"""

import functools

from numba import config, cuda, float32, int64, uint32

from .dequantize_kernels import decode
from .intrinsics import (
    bits_float,
    commit_copies,
    copy4,
    copy16,
    float_bits,
    has_float16_range,
    load,
    load8,
    load8_bytes,
    load16,
    max_across,
    multiply_16x16x8,
    pack_half,
    pair_at,
    store,
    sum_across,
    waiting_for_copies,
    widen8,
)

EVERY_LANE = 0xFFFFFFFF
ROWS_OF_W = 1 if config.ENABLE_CUDASIM else 8  # v1, v2: warps a thread block, one row of W each
WARPS = 16  # v3, v4: they share a tile of 16 rows of W, and split its columns
THREADS = 32 * WARPS
BATCH = 4  # 16-byte loads of x that a thread has under way at once
BATCH_WORDS = 4 * BATCH
MOST_ROWS = 8  # of x in one pass: as many as a tensor core step takes
LEAST_STAGES, MOST_STAGES = 2, 6
UPPER, MAGNITUDE = 0xFFFF0000, 0x7FFF0000  # of the two bfloat16 in a uint32, the upper one, and without its sign
MAX_REGISTERS = 65536 // THREADS  # what a thread may have when a block of 16 warps is to fit
STEP = 128  # columns that a warp takes at a time


@cuda.jit(device=True, inline="always")
def absmax_of(block, absmax, codes, group_absmax, offset, code_map, group_shift, nested):
    if nested:
        return decode(block, codes, group_absmax, offset, code_map, group_shift)
    return absmax[block]


@cuda.jit(device=True, inline="always")
def finish(y, bias, has_bias, index, column, total):
    store(y, index, total + load(bias, column) if has_bias else total)


@cuda.jit
def v1(
    x, packed, absmax, codes, group_absmax, offset, code_map, levels, bias, y,
    rows, n, k, block_shift, group_shift, nested, has_bias,
):  # fmt: skip
    lane = cuda.threadIdx.x & 31
    task = int64(cuda.blockIdx.x) * ROWS_OF_W + (cuda.threadIdx.x >> 5)  # one (row of x, row of W)
    column = task % n
    row = task // n
    total = float32(0)
    if row < rows:
        for j in range(lane, k, 32):
            element = column * k + j
            byte = uint32(packed[element >> 1])
            code = byte & uint32(15) if element & 1 else byte >> uint32(4)
            scale = absmax_of(
                element >> block_shift, absmax, codes, group_absmax, offset, code_map, group_shift, nested
            )
            total += levels[code] * scale * load(x, row * k + j)
    total = sum_across(total, 32)
    if lane == 0 and row < rows:
        finish(y, bias, has_bias, row * n + column, column, total)


@cuda.jit
def v2(
    x, packed, absmax, codes, group_absmax, offset, code_map, levels, bias, y,
    rows, n, k, block_shift, group_shift, nested, has_bias,
):  # fmt: skip
    table = cuda.shared.array(16, float32)
    words = cuda.local.array(4, uint32)
    raw = cuda.local.array(8, uint32)
    values = cuda.local.array(8, float32)
    if cuda.threadIdx.x < 16:
        table[cuda.threadIdx.x] = levels[cuda.threadIdx.x]
    cuda.syncthreads()
    lane = cuda.threadIdx.x & 31
    task = int64(cuda.blockIdx.x) * ROWS_OF_W + (cuda.threadIdx.x >> 5)
    column = task % n
    row = task // n
    total = float32(0)
    if row < rows:
        for j in range(lane, k >> 5, 32):  # 32 columns, 16 bytes: within one block, which has at least 32 values
            first = column * k + 32 * j
            load16(packed, first >> 5, words, 0)
            scale = absmax_of(first >> block_shift, absmax, codes, group_absmax, offset, code_map, group_shift, nested)
            part = float32(0)
            for w in range(4):
                load8(x, ((row * k) >> 3) + 4 * j + w, raw)
                widen8(x, raw, values)
                for b in range(4):
                    byte = uint32(words[w] >> uint32(8 * b))
                    part += table[(byte >> uint32(4)) & uint32(15)] * values[2 * b]
                    part += table[byte & uint32(15)] * values[2 * b + 1]
            total += part * scale
    total = sum_across(total, 32)
    if lane == 0 and row < rows:
        finish(y, bias, has_bias, row * n + column, column, total)


# v3, v4. Shared memory, in words of 4 bytes: the table of pairs, x as float16, the warps' sums (twice), the ring.
PAIRS = 256 * 32  # 256 bytes x 32 lanes: every lane has its own copy, so no lookup waits for another
SUMS = 2 * WARPS * 16  # for each row of x
OF_A_WARP = 16 * 16 + 32  # a warp's part of a stage: 16 rows of 64 bytes of codes, and 32 absmax
STAGE = WARPS * OF_A_WARP


def row_words(k):
    """A row of x as float16, and 16 bytes more: so that a warp reads 8 rows without bank conflicts."""
    return k // 2 + 4


@functools.cache
def plan(rows, k, limit):
    """(rows of x in a pass, stages) that fit into `limit` bytes of shared memory; (0, 0) where not one row does."""
    for some in range(min(rows, MOST_ROWS), 0, -1):
        stages = (limit // 4 - PAIRS - some * (row_words(k) + SUMS)) // STAGE
        if stages >= LEAST_STAGES:
            passes = -(-rows // some)
            return -(-rows // passes), min(stages, MOST_STAGES)
    return 0, 0


def shared_bytes(rows, k, stages):
    return 4 * (PAIRS + rows * (row_words(k) + SUMS) + stages * STAGE)


@cuda.jit(device=True, inline="always")
def fill_pairs(shared, levels, lane, warp):
    """shared[32 byte + lane] = the two levels of `byte` as float16, high nibble (the even element) in the low half."""
    level = levels[lane & 15]
    high = cuda.shfl_sync(EVERY_LANE, level, warp)
    for low in range(16):
        shared[(16 * warp + low) * 32 + lane] = pack_half(high, cuda.shfl_sync(EVERY_LANE, level, low))


@cuda.jit(device=True, inline="always")
def read_x(x, first, vectors, raw):
    """Set under way: this thread's BATCH vectors of eight elements, from `first` on; zeros past the end."""
    for j in range(BATCH):
        if first + j * THREADS < vectors:
            load16(x, first + j * THREADS, raw, 4 * j)
        else:
            for e in range(4):
                raw[4 * j + e] = uint32(0)


@cuda.jit(device=True, inline="always")
def greater_of_two(word):
    """Bits of the greater magnitude of two bfloat16 in one uint32, as a float32."""
    return max(word & uint32(MAGNITUDE), uint32(word << uint32(16)) & uint32(MAGNITUDE))


@cuda.jit(device=True, inline="always")
def greatest_x(x, vectors, raw, shared, place):
    """Bits of max |x|, the same in every thread, for bfloat16 x. `raw` holds this thread's first vectors."""
    more = cuda.local.array(BATCH_WORDS, uint32)
    bits = uint32(0)
    for e in range(BATCH_WORDS):
        bits = max(bits, greater_of_two(raw[e]))
    for first in range(int64(cuda.threadIdx.x) + BATCH * THREADS, vectors, BATCH * THREADS):
        read_x(x, first, vectors, more)
        for e in range(BATCH_WORDS):
            bits = max(bits, greater_of_two(more[e]))
    shared[place + (cuda.threadIdx.x >> 5)] = max_across(bits, 32)
    cuda.syncthreads()
    return max_across(shared[place + (cuda.threadIdx.x & (WARPS - 1))], WARPS)


@cuda.jit(device=True, inline="always")
def scaled_pair(x, word, scale):
    """Two elements of x, times scale, as float16 in one uint32. Scale is 1 for float16 x, whose bits stay."""
    if has_float16_range(x):
        return word
    return pack_half(bits_float(uint32(word << uint32(16))) * scale, bits_float(word & uint32(UPPER)) * scale)


@cuda.jit(device=True, inline="always")
def stage_x(x, vectors, of_a_row, scale, raw, shared):
    """x * scale as float16 into shared memory, rows 16 bytes further apart than in x. `raw`: as in greatest_x."""
    for first in range(int64(cuda.threadIdx.x), vectors, BATCH * THREADS):
        if first >= BATCH * THREADS:
            read_x(x, first, vectors, raw)
        for j in range(BATCH):
            v = first + j * THREADS
            if v < vectors:
                row = int64(0)
                for m in range(1, MOST_ROWS):
                    row += 1 if v >= m * of_a_row else 0
                for e in range(4):
                    shared[PAIRS + 4 * (v + row) + e] = scaled_pair(x, raw[4 * j + e], scale)


@cuda.jit(device=True, inline="always")
def pair(shared, word, b, lane_bytes):
    """The two float16 of byte b of `word`: the byte times 128, the distance of two entries in a lane's table."""
    spread = uint32(word << uint32(7)) if b == 0 else uint32(word >> uint32(8 * b - 7))
    return pair_at(shared, spread, lane_bytes)


@cuda.jit(device=True, inline="always")
def next_step(tile, chunk, warp, past):
    """The (tile, chunk) that this warp takes after these: every 16th chunk, then the thread block's next tile."""
    if chunk + WARPS < past:
        return tile, chunk + WARPS
    return tile + cuda.gridDim.x, warp


@cuda.jit(device=True, inline="always")
def fetch(
    shared, place, my_codes, tile, chunk, lane, packed, absmax,
    codes, group_absmax, offset, code_map, k, block_shift, group_shift, nested,
):  # fmt: skip
    """Set a step under way into this warp's part of a stage: 128 columns of 16 rows, and their absmax.

    Lane (g, t) copies 16 bytes of rows g and g + 8, and the absmax of the t % 2nd 64 columns of row g or, from t = 2
    on, g + 8. A double-quantized absmax is decoded at once: its bytes are few and mostly in the nearest cache.
    """
    g, t = lane >> 2, lane & 3
    first = ((16 * tile + g) * k + chunk * STEP) >> 5
    copy16(shared, place + my_codes, packed, first + t)
    copy16(shared, place + my_codes + 128, packed, first + (k >> 2) + t)
    block = ((16 * tile + g + 8 * (t >> 1)) * k + chunk * STEP + 64 * (t & 1)) >> block_shift
    if nested:
        value = decode(block, codes, group_absmax, offset, code_map, group_shift)
        shared[place + 256 + lane] = float_bits(value)
    else:
        copy4(shared, place + 256 + lane, absmax, block)


def tensor_core_kernel(stages):
    """The kernel for up to 8 rows of x, with a ring of `stages` steps, all but one of them under way.

    A warp takes a tile of 16 rows of W, 128 columns at a time. A tensor core step multiplies A (16 rows of W,
    16 columns) by B (16 columns, 8 rows of x). Lane (g, t) of a warp, g = lane / 4 and t = lane % 4, holds rows g and
    g + 8 of A and x's row g of B. Any order of columns will do, as long as both follow it: lane t takes columns 16t to
    16t + 15 of each 64, 8 bytes of codes, in four steps. So the sums of 64 columns, which share an absmax, come out by
    themselves. Lanes with no row of x repeat the last one, and what they get is left.
    """
    wait_for_the_next = waiting_for_copies(stages - 2)

    @cuda.jit
    def kernel(
        x, packed, absmax, codes, group_absmax, offset, code_map, levels, bias, y,
        rows, n, k, block_shift, group_shift, nested, has_bias,
    ):  # fmt: skip
        shared = cuda.shared.array(0, uint32)
        raw = cuda.local.array(BATCH_WORDS, uint32)
        low_codes = cuda.local.array(2, uint32)  # of row g of the tile
        high_codes = cuda.local.array(2, uint32)  # of row g + 8
        b = cuda.local.array(8, uint32)
        sums = cuda.local.array(4, float32)  # (row g, x's row 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
        totals = cuda.local.array(4, float32)
        thread = uint32(cuda.threadIdx.x)
        lane_bytes = uint32((thread & uint32(31)) * uint32(4))
        lane, warp = int64(thread & uint32(31)), int64(thread >> uint32(5))
        g, t = lane >> 2, lane & 3
        tiles, chunks, of_a_row = n >> 4, k >> 7, (k >> 1) + 4
        past = (chunks + WARPS - 1) & ~(WARPS - 1)
        all_sums = PAIRS + rows * of_a_row
        mine = all_sums + rows * SUMS + warp * OF_A_WARP
        my_codes = 16 * g + 4 * (t ^ (g & 2))  # rows 2, 3, 6, 7 have their halves swapped, against bank conflicts
        my_row = PAIRS + min(g, rows - 1) * of_a_row + 8 * t

        tile, chunk = int64(cuda.blockIdx.x), warp
        coming_tile, coming_chunk = tile, chunk
        for stage in range(stages - 1):
            if coming_tile < tiles and coming_chunk < chunks:
                fetch(
                    shared, mine + stage * STAGE, my_codes, coming_tile, coming_chunk, lane, packed, absmax,
                    codes, group_absmax, offset, code_map, k, block_shift, group_shift, nested,
                )  # fmt: skip
            commit_copies()
            coming_tile, coming_chunk = next_step(coming_tile, coming_chunk, warp, past)

        vectors = (rows * k) >> 3
        read_x(x, int64(thread), vectors, raw)
        fill_pairs(shared, levels, lane, warp)
        scale = inverse = float32(1)
        if not has_float16_range(x):  # a power of two brings the greatest |x| to [2^14, 2^15): float16 loses nothing
            exponent = max(uint32(15), min(uint32(254), greatest_x(x, vectors, raw, shared, all_sums) >> uint32(23)))
            scale = bits_float(uint32(uint32(uint32(268) - exponent) << uint32(23)))
            inverse = bits_float(uint32(uint32(exponent - uint32(14)) << uint32(23)))
        stage_x(x, vectors, k >> 3, scale, raw, shared)
        cuda.syncthreads()

        for e in range(4):
            totals[e] = float32(0)
        stage, last, buffer = int64(0), int64(stages - 1), int64(0)
        turn = thread  # which warp adds up moves on with every tile: none falls behind
        while tile < tiles:
            wait_for_the_next()
            cuda.syncwarp()
            if coming_tile < tiles and coming_chunk < chunks:
                fetch(
                    shared, mine + last * STAGE, my_codes, coming_tile, coming_chunk, lane, packed, absmax,
                    codes, group_absmax, offset, code_map, k, block_shift, group_shift, nested,
                )  # fmt: skip
            commit_copies()
            coming_tile, coming_chunk = next_step(coming_tile, coming_chunk, warp, past)
            if chunk < chunks:
                place = mine + stage * STAGE
                my_absmax = bits_float(shared[place + 256 + lane])
                for half in range(2):  # of the chunk: 64 columns
                    at = (place + 16 * g + 4 * ((2 * half + (t >> 1)) ^ (g & 2)) + 2 * (t & 1)) >> 1
                    load8_bytes(shared, at, low_codes)
                    load8_bytes(shared, at + 64, high_codes)
                    for part in range(2):
                        load16(shared, ((my_row + chunk * 64 + 32 * half) >> 2) + part, b, 4 * part)
                    for e in range(4):
                        sums[e] = float32(0)
                    for s in range(4):
                        first, second = 2 * (s & 1), 2 * (s & 1) + 1
                        multiply_16x16x8(
                            sums,
                            0,
                            pair(shared, low_codes[s >> 1], first, lane_bytes),
                            pair(shared, high_codes[s >> 1], first, lane_bytes),
                            pair(shared, low_codes[s >> 1], second, lane_bytes),
                            pair(shared, high_codes[s >> 1], second, lane_bytes),
                            b[2 * s],
                            b[2 * s + 1],
                        )
                    quad = (lane & 28) + half  # the lanes that hold these 64 columns' absmax
                    low_absmax = cuda.shfl_sync(EVERY_LANE, my_absmax, quad)
                    high_absmax = cuda.shfl_sync(EVERY_LANE, my_absmax, quad + 2)
                    totals[0] += sums[0] * low_absmax
                    totals[1] += sums[1] * low_absmax
                    totals[2] += sums[2] * high_absmax
                    totals[3] += sums[3] * high_absmax
            if chunk + WARPS >= past:  # the tile is done: the 16 warps add up
                for e in range(4):
                    m = 2 * t + (e & 1)
                    if m < rows:
                        at = all_sums + ((buffer * WARPS + warp) * rows + m) * 16 + g + 8 * (e >> 1)
                        shared[at] = float_bits(totals[e])
                    totals[e] = float32(0)
                cuda.syncthreads()
                if turn < uint32(16 * rows):
                    total = float32(0)
                    for w in range(WARPS):
                        total += bits_float(shared[all_sums + (buffer * WARPS + w) * rows * 16 + int64(turn)])
                    column = 16 * tile + int64(turn & uint32(15))
                    finish(y, bias, has_bias, int64(turn >> uint32(4)) * n + column, column, total * inverse)
                turn = uint32((turn + uint32(32)) & uint32(THREADS - 1))
                buffer = 1 - buffer
            tile, chunk = next_step(tile, chunk, warp, past)
            last = stage
            stage = stage + 1 if stage + 1 < stages else int64(0)

    return kernel


@functools.cache
def tensor_cores(stages):
    """The kernel with that many stages, made when first asked for."""
    return tensor_core_kernel(stages)


VERSIONS = {"v1": v1, "v2": v2, "v3": tensor_core_kernel(2), "v4": tensor_core_kernel(MOST_STAGES)}
