"""y = x W^T + bias for a few rows of x and a packed 4-bit weight W (n, k), float32 accumulation.

v1  a warp a row of W, one code at a time: the kernel that teaches; takes every shape and block size
v2  the levels in shared memory, 16 bytes of codes a load, each block's absmax applied to a sum instead of to values
v3  tensor cores: two codes become two float16 by ONE table lookup, 16 rows of W at once, the next codes under way
    while these are multiplied; takes up to 16 rows of x in one pass over W

v4 to v6 go on from here in `gemm_kernels`, `few_rows` and `warpgroup_kernels`.

All take (x, packed, absmax, codes, group_absmax, offset, code_map, levels, bias, y, rows, n, k, block_shift,
group_shift, nested, has_bias). With `nested`, a block's absmax is code_map[code] * group_absmax + offset.
"""

from numba import config, cuda, float32, int32, int64, uint32

from .dequantize_kernels import decode
from .intrinsics import (
    bits_float,
    float_bits,
    from_lane,
    has_float16_range,
    load,
    load8,
    load16,
    max_across,
    multiply_16x8x16,
    pack_half,
    pair_at,
    store,
    store16_words,
    sum_across,
    widen8,
)

ROWS_OF_W = 1 if config.ENABLE_CUDASIM else 8  # v1, v2: warps a thread block, one row of W each
WARPS = 16  # v3: they share a tile of 16 rows of W, and split its columns
THREADS = 32 * WARPS
UPPER, MAGNITUDE = 0xFFFF0000, 0x7FFF0000  # v3: of the two bfloat16 in a uint32, the upper one, and without its sign
MAX_REGISTERS = 65536 // THREADS  # v3: what a thread may have when a block of 16 warps is to fit
STEP = 256  # v3: columns that a warp takes at a time


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


# v3. Shared memory, in words of 4 bytes: the table of pairs, zeros, x as float16, the warps' partial sums (twice).
PAIRS_END = 256 * 64  # for each byte a copy for every lane, so that no lookup waits for another, and 32 words unused
ZEROS = PAIRS_END + 16  # 16 words on: in other banks than the x that a warp reads at the same time
X = ZEROS + 128 + 16


def shared_words(rows, k):
    return X + rows * k // 2 + 2 * WARPS * rows * 16


@cuda.jit(device=True, inline="always")
def fill_pairs(shared, levels, lane, warp):
    """shared[64 byte + lane] = the two levels of `byte` as float16, high nibble (the even element) in the low half.

    Every lane loads one level and gets the others from its neighbours.
    """
    level = levels[lane & 15]
    high = from_lane(level, warp)
    for low in range(16):
        shared[uint32((16 * warp + low) * 64 + lane)] = pack_half(high, from_lane(level, low))


@cuda.jit(device=True, inline="always")
def read_x(x, first, vectors, batch, raw):
    """Set under way: `batch` of this thread's vectors of eight elements, from `first` on; zeros past the end."""
    for j in range(batch):
        if first + j * THREADS < vectors:
            load16(x, first + j * THREADS, raw, 4 * j)
        else:
            for e in range(4):
                raw[4 * j + e] = uint32(0)


@cuda.jit(device=True, inline="always")
def place_of(v):
    """Where vector v of x lies in shared memory: 4t + j of each 16 at 4j + t, as the lanes will read it."""
    return (X >> 2) + (v & ~15) + 4 * (v & 3) + ((v >> 2) & 3)


@cuda.jit(device=True, inline="always")
def stage_x(x, vectors, batch, raw, shared):
    """Copy x into shared memory; return the bits of this thread's greatest magnitude, if x is bfloat16.

    `raw` holds this thread's first vectors, loaded earlier.
    """
    bits = uint32(0)
    for first in range(int32(cuda.threadIdx.x), vectors, batch * THREADS):
        if first >= batch * THREADS:
            read_x(x, first, vectors, batch, raw)
        for j in range(batch):
            if first + j * THREADS < vectors:
                store16_words(shared, place_of(first + j * THREADS), raw, 4 * j)
        for e in range(4 * batch):
            bits = max(bits, max(raw[e] & uint32(MAGNITUDE), uint32(raw[e] << uint32(16)) & uint32(MAGNITUDE)))
    return bits


@cuda.jit(device=True, inline="always")
def greatest_of_all(bits, shared, end):
    """The greatest `bits` of the thread block, the same in every thread."""
    shared[uint32(end + (cuda.threadIdx.x >> 5))] = max_across(bits, 32)
    cuda.syncthreads()
    return max_across(shared[uint32(end + (cuda.threadIdx.x & (WARPS - 1)))], WARPS)


@cuda.jit(device=True, inline="always")
def scale_x(vectors, scale, words, shared):
    """This thread's vectors, bfloat16, times scale, as float16 in the same place."""
    for v in range(int32(cuda.threadIdx.x), vectors, THREADS):
        load16(shared, place_of(v), words, 0)
        for e in range(4):
            low, high = bits_float(uint32(words[e] << uint32(16))), bits_float(words[e] & uint32(UPPER))
            words[e] = pack_half(low * scale, high * scale)
        store16_words(shared, place_of(v), words, 0)


@cuda.jit(device=True, inline="always")
def fetch(packed, first, of_8_rows, words):
    """Set under way: a lane's 16 bytes, number `first` of all, of both 128 columns of a step, in rows g and g + 8."""
    load16(packed, first, words, 0)
    load16(packed, first + of_8_rows, words, 4)
    load16(packed, first + 4, words, 8)
    load16(packed, first + 4 + of_8_rows, words, 12)


@cuda.jit(device=True, inline="always")
def next_step(tile, chunk, start, warp, past, jump):
    """(tile, chunk, start) that this warp takes after these: every 16th chunk, then the thread block's next tile."""
    if chunk + WARPS < past:
        return tile, int32(chunk + WARPS), start + WARPS * STEP
    return int32(tile + cuda.gridDim.x), warp, start + jump


def tensor_core_kernel(fragments):
    """v3 for up to 4 * fragments rows of x.

    A thread block takes tiles of 16 rows of W. Its warps take a tile's columns by chunks of 256, every 16th chunk the
    same warp, and each chunk in two pieces of 128. Lane (g, t) of a warp, g = lane / 4 and t = lane % 4, reads:

             piece 0: columns 0..127       piece 1: columns 128..255
            ┌──────┬──────┬──────┬──────┬──────┬──────┬──────┬──────┐
    row g   │ t: 0 │    1 │    2 │    3 │    0 │    1 │    2 │    3 │  codes of 32 columns: one load of 16 bytes
            ├──────┴──────┼──────┴──────┼──────┴──────┼──────┴──────┤
    row g   │    t: 0     │      1      │      2      │      3      │  absmax of 64 columns
            └─────────────┴─────────────┴─────────────┴─────────────┘  the same of row g + 8

    One tensor core step multiplies A (16 rows of W, 16 columns) by B (16 columns, 8) and adds the product to C. It
    sums over columns, so any order of them will do as long as A and B share it: a lane gives A four of its codes in
    each of its two rows, whichever they are, and B the x that meets them. Of B's 8 columns two belong to each row m
    of x, m < 4, and only one of them meets the columns of W that a lane holds:

                              B's column 2m   2m + 1
    t = 0, 1: the first 64 columns    x          0      C   lane (g, t), rows g and g + 8: the sums of x's row t
    t = 2, 3: the last 64             0          x          over the first 64 columns, and over the last

    So each 64 columns, which share an absmax, come out as a sum of their own, and are multiplied by it once. A piece
    takes 8 steps: the 8 codes of each of its 4 words are two steps. Further fragments are further rows of x.
    """
    four = 4 * fragments
    chains = 2 if fragments == 1 else 1  # independent sums, so that one step need not wait for the last
    all_sums = four * chains
    batch = 2 if fragments == 1 else 4  # 16-byte loads of x that a thread has under way at once
    batch_words = 4 * batch

    @cuda.jit(device=True, inline="always")
    def multiply_piece(shared, words, piece, b_at, ahead, lane_bytes, a, b, sums):
        """sums = 16 rows of W times B in a piece of 128 columns, whose B lies `ahead` 16 bytes behind b_at."""
        for s in range(all_sums):
            sums[s] = float32(0)
        for j in range(4):
            for h in range(2):
                for r in range(2):  # row g, row g + 8
                    word = words[8 * piece + 4 * r + j]
                    a[4 * h + r] = pair_at(shared, word, 2 * h, lane_bytes)
                    a[4 * h + r + 2] = pair_at(shared, word, 2 * h + 1, lane_bytes)
            for f in range(fragments):
                load16(shared, b_at[f] + ahead + 4 * j, b, 0)
                for h in range(2):
                    multiply_16x8x16(
                        sums, four * (h % chains) + 4 * f,
                        a[4 * h], a[4 * h + 1], a[4 * h + 2], a[4 * h + 3], b[2 * h], b[2 * h + 1],
                    )  # fmt: skip
        for s in range(four, all_sums):
            sums[s - four] += sums[s]

    @cuda.jit(device=True, inline="always")
    def add_blocks(sums, scales, quad, low, high):
        """Add a piece's sums, each times its absmax: lanes quad and quad + 1 hold those of its two blocks."""
        low_0 = from_lane(scales[0], quad)
        low_1 = from_lane(scales[0], quad + 1)
        high_0 = from_lane(scales[1], quad)
        high_1 = from_lane(scales[1], quad + 1)
        for f in range(fragments):
            low[f] += sums[4 * f] * low_0 + sums[4 * f + 1] * low_1
            high[f] += sums[4 * f + 2] * high_0 + sums[4 * f + 3] * high_1

    @cuda.jit(device=True, inline="always")
    def put_down(shared, at, x_rows, g, t, low, high):
        """Write this lane's sums of a tile from word `at` on, and begin anew."""
        for f in range(fragments):
            m = 4 * f + t
            if m < x_rows:
                place = at + m * 16 + g
                shared[uint32(place)] = float_bits(low[f])
                shared[uint32(place + 8)] = float_bits(high[f])
            low[f] = high[f] = float32(0)

    @cuda.jit(device=True, inline="always")
    def of_all_warps(shared, at, apart):
        """The sum of what the warps have put down."""
        total = float32(0)
        for w in range(WARPS):
            total += bits_float(shared[uint32(at + w * apart)])
        return total

    @cuda.jit
    def v3(
        x, packed, absmax, codes, group_absmax, offset, code_map, levels, bias, y,
        rows, n, k, block_shift, group_shift, nested, has_bias,
    ):  # fmt: skip
        shared = cuda.shared.array(0, uint32)
        words = cuda.local.array(16, uint32)
        ahead = cuda.local.array(16, uint32)
        a = cuda.local.array(8, uint32)
        b = cuda.local.array(4, uint32)
        b_at = cuda.local.array(fragments, int32)  # where this lane's part of B starts, in 16 bytes: in x, or zeros
        raw = cuda.local.array(batch_words, uint32)
        sums = cuda.local.array(all_sums, float32)
        scales = cuda.local.array(2, float32)  # absmax of rows g and g + 8 in this lane's 64 columns
        coming = cuda.local.array(2, float32)  # the next step's
        low = cuda.local.array(fragments, float32)  # row g of the tile, x's row 4f + t
        high = cuda.local.array(fragments, float32)  # row g + 8
        thread = uint32(cuda.threadIdx.x)
        lane_bytes = uint32((thread & uint32(31)) * uint32(4))
        lane, warp = int32(thread & uint32(31)), int32(thread >> uint32(5))
        g, t = lane >> 2, lane & 3
        tiles, chunks = int32(n >> 4), int32(k // STEP)
        past = int32((chunks + WARPS - 1) & ~(WARPS - 1))
        tile, chunk = int32(cuda.blockIdx.x), warp
        start = 16 * k * cuda.blockIdx.x + warp * STEP  # the first element of the tile's first row in the chunk
        jump = 16 * k * cuda.gridDim.x - (past - WARPS) * STEP  # from this warp's last chunk to its next tile's first
        my_codes, my_block, of_8_rows = ((g * k) >> 5) + t, g * k + 64 * t, k >> 2
        vectors = int32((rows * k) >> 3)
        read_x(x, int32(thread), vectors, batch, raw)
        fill_pairs(shared, levels, lane, warp)
        for h in range(2):
            scales[h] = coming[h] = float32(0)
        if chunk < chunks:
            fetch(packed, (start >> 5) + my_codes, of_8_rows, words)
            for h in range(2):
                block = (start + my_block + 8 * h * k) >> block_shift
                scales[h] = absmax_of(block, absmax, codes, group_absmax, offset, code_map, group_shift, nested)
        if thread < uint32(X - PAIRS_END):
            shared[uint32(PAIRS_END) + thread] = uint32(0)
        end = X + ((rows * k) >> 1)
        bits = stage_x(x, vectors, batch, raw, shared)
        inverse = float32(1)
        if not has_float16_range(x):  # a power of two brings the greatest |x| to [2^14, 2^15): float16 loses nothing
            exponent = max(uint32(15), min(uint32(254), greatest_of_all(bits, shared, end) >> uint32(23)))
            scale_x(vectors, bits_float(uint32(uint32(uint32(268) - exponent) << uint32(23))), raw, shared)
            inverse = bits_float(uint32(uint32(exponent - uint32(14)) << uint32(23)))
        cuda.syncthreads()

        x_rows = int32(rows)
        mine = (t >> 1) == (g & 1)
        b_step = int32(STEP // 8) if mine else int32(0)  # how much further it lies for the next chunk
        for f in range(fragments):
            m = min(4 * f + (g >> 1), x_rows - 1)  # what comes of rows that are not there is left
            b_at[f] = int32(((X + ((m * k) >> 1) if mine else ZEROS) >> 2) + t)
            low[f] = high[f] = float32(0)
        buffer, turn = int32(0), int32(thread)  # which warp adds up moves on with every tile: none falls behind
        while tile < tiles:
            next_tile, next_chunk, start = next_step(tile, chunk, start, warp, past, jump)
            if next_tile < tiles and next_chunk < chunks:
                fetch(packed, (start >> 5) + my_codes, of_8_rows, ahead)
                for h in range(2):
                    block = (start + my_block + 8 * h * k) >> block_shift
                    coming[h] = absmax_of(block, absmax, codes, group_absmax, offset, code_map, group_shift, nested)
            if chunk < chunks:
                for piece in range(2):
                    multiply_piece(shared, words, piece, b_at, chunk * b_step + 16 * piece, lane_bytes, a, b, sums)
                    add_blocks(sums, scales, (lane & 28) + 2 * piece, low, high)
            for e in range(16):
                words[e] = ahead[e]
            for h in range(2):
                scales[h] = coming[h]
            if next_tile != tile:  # the tile is done: the 16 warps add up
                sums_at = int32(end + buffer * WARPS * 16 * x_rows)
                put_down(shared, sums_at + warp * 16 * x_rows, x_rows, g, t, low, high)
                cuda.syncthreads()
                if turn < 16 * x_rows:
                    column = 16 * int64(tile) + (turn & 15)
                    total = of_all_warps(shared, sums_at + turn, 16 * x_rows)
                    finish(y, bias, has_bias, (turn >> 4) * n + column, column, total * inverse)
                if fragments < 4:  # with 16 rows half of the warps add up anyway, and registers are scarce
                    turn = int32((turn + 32) & (THREADS - 1))
                buffer = int32(1 - buffer)
            tile, chunk = next_tile, next_chunk

    return v3


TENSOR_CORES = {fragments: tensor_core_kernel(fragments) for fragments in (1, 2, 4)}
