"""y = x W^T + bias for 1 to 64 rows of x and a packed 4-bit weight W (n, k): v4, in use from sm_80 on.

A thread block takes up to 8 tiles of 16 rows of W and all their columns, in steps. What the next steps need (codes and
x) is copied into shared memory while this one is multiplied: a ring of `stages`. In a step each warp takes some of the
tiles and 64 columns:

            columns of W: 64 a warp                          one tile: 16 rows x 64 columns
            warp 0   warp 1   warp 2 …                       two pieces of 32 columns, each 16 bytes a row
    tile 0  ┌────────┬────────┬─────                         lane (g, t) gets bytes 4t..4t+3 of rows g and g + 8:
    tile 1  │ warp 0 │ warp 1 │                              columns 8t..8t+7 of each piece
      …     └────────┴────────┴─────                         byte -> two levels by ONE look-up in shared memory

One tensor core step multiplies A (16 rows of W, 16 columns) by B (16 columns, 8 rows of x). It sums over columns, so
any order of columns will do as long as A and B share it: step h of a piece gives lane t columns 8t + 4h.. of the
piece, which are four neighbours in W and in x.

    A   lane (g, t): row g, row g + 8, columns 8t + 4h, + 1 | the same rows, columns 8t + 4h + 2, + 3
    B   lane (g, t): row g of x, the same columns
    C   lane (g, t): rows g and g + 8 of the tile; rows 2t and 2t + 1 of x

A tile's four steps (two, where blocks have 32) share a block of absmax, so their sum is multiplied by it once, in
float32. Lane (g, t) reads the absmax of its warp's tile t, one step ahead, and hands it on. The next tile's codes are
read before this one's are multiplied. At the end the warps that hold other columns of the same rows add up through
shared memory, always in the same order.
"""

import functools
from typing import NamedTuple

from numba import config, cuda, float32, int32, uint32

from .gemv_kernels import finish
from .intrinsics import (
    bits_float,
    copies_done,
    copies_go,
    copy16,
    float_bits,
    from_lane,
    kernel_before_done,
    load16_shared,
    load_matrices,
    multiply,
    multiply_tile,
    next_kernel_may_start,
    pack_like,
    pair_at,
    pinned,
    shared_start,
    shifted,
)

PAIRS = 256 * 64  # words: for each byte a copy of its pair for every lane, and 32 words unused
TABLES = PAIRS + 256  # and what the 8-bit codes of a double-quantized absmax stand for
COLUMNS = 64  # of W that a warp takes in a step


class Layout(NamedTuple):
    """How a thread block is cut: warps over rows and columns, its tiles, eights of x's rows, stages of the ring."""

    warps_down: int
    warps_along: int
    tiles: int
    eights: int
    stages: int
    halves: bool = False  # absmax blocks of 32

    @property
    def threads(self):
        return 32 * self.warps_down * self.warps_along

    @property
    def step(self):
        """Columns of W in a step."""
        return COLUMNS * self.warps_along

    @property
    def x_pitch(self):
        """Words from row to row of x in a stage; no bank is met twice."""
        return self.step // 2 + 16

    @property
    def w_pitch(self):
        """Words from row to row of the codes in a stage, likewise."""
        return self.step // 8 + 4

    @property
    def x_bytes(self):
        """Bytes of x in a stage."""
        return 4 * 8 * self.eights * self.x_pitch

    @property
    def stage_bytes(self):
        return self.x_bytes + 4 * 16 * self.tiles * self.w_pitch

    def shared_bytes(self, rows):
        sums = 4 * self.warps_along * rows * (16 * self.tiles + 4)
        return 4 * TABLES + max(self.stages * self.stage_bytes, sums)


@cuda.jit(device=True, inline="always")
def read_tables(x, levels, code_map, nested, thread, threads, pairs, decoded):
    """Set under way, and pack: this thread's share of the two tables."""
    for i in range(max(1, 256 // threads)):
        byte = int32((thread + i * threads) & 255)
        pairs[i] = pack_like(x, levels[byte >> 4], levels[byte & 15])
        decoded[i] = code_map[byte] if nested else float32(0)


@cuda.jit(device=True, inline="always")
def fill_tables(shared, nested, thread, threads, pairs, decoded):
    """shared[64 byte + lane] = the two levels of `byte` in the type of x, high nibble (the even element) lower.

    After the pairs, at place_of(code), what an 8-bit code of a double-quantized absmax stands for.
    """
    for i in range(max(1, 256 // threads)):
        byte = int32((thread + i * threads) & 255)
        for copy in range(0, 32, max(1, threads >> 8)):
            shared[uint32(64 * byte + ((copy + (thread >> 8) + thread) & 31))] = pairs[i]
        if nested and thread < 256:
            shared[place_of(uint32(byte))] = float_bits(decoded[i])


@cuda.jit(device=True, inline="always")
def place_of(code):
    return uint32(uint32(PAIRS) + code)


@cuda.jit(device=True, inline="always")
def read_scales(
    count, absmax, codes, group_absmax, nested, first, column_32, k_32, shift, group_shift, read, coded
):  # fmt: skip
    """Set under way: `count` absmax of two rows (their first in first[0], first[1]), or their codes and groups."""
    if column_32 < k_32:
        for s in range(count):
            index = shifted(int32(first[s % 2] + column_32 + s // 2), shift)
            if nested:
                coded[s] = codes[index]
                read[s] = group_absmax[shifted(index, group_shift)]
            else:
                read[s] = absmax[index]


@cuda.jit(device=True, inline="always")
def put_down(shared, sums, first, eights, along_at, first_row, x_rows, pitch, row, t):
    """Set down a lane's sums of one tile for eights of x's rows from first_row on; `row` of the block is its g-th."""
    for f in range(eights):
        for e in range(4):
            row_of_x = int32(first_row + 8 * f + 2 * t + (e & 1))
            if row_of_x < x_rows:
                place = int32(TABLES + (along_at * x_rows + row_of_x) * pitch + row + 8 * (e >> 1))
                shared[uint32(place)] = float_bits(sums[first + 4 * f + e])


@cuda.jit(device=True, inline="always")
def add_up(shared, along, x_rows, pitch, thread, threads, row_0, row_count, n, bias, has_bias, y):
    """What the warps of other columns set down, added up in their order and written."""
    for row_of_x in range(thread >> 5, x_rows, threads >> 5):
        for row in range(thread & 31, row_count, 32):
            total = float32(0)
            for w in range(along):
                total += bits_float(shared[uint32(int32(TABLES + (w * x_rows + row_of_x) * pitch + row))])
            finish(y, bias, has_bias, row_of_x * n + row_0 + row, row_0 + row, total)


def layouts(eights, tiles, block_size):
    """Ways to cut a block of so many tiles, and eights of x's rows: the fastest first."""
    halves = block_size < 64
    if config.ENABLE_CUDASIM:
        return [Layout(1, 2, tiles, eights, 2, halves)] if tiles <= 2 else []
    a_warp = 4 if eights <= 4 else 2  # tiles, at most: more do not fit into its registers
    down = next((down for down in (1, 2, 4) if a_warp * down >= tiles), None)
    if tiles > 8 or down is None:
        return []
    along = 8 if eights <= 2 else 8 // down  # up to 16 warps, or 8 with twice the registers
    ways = [along >> less for less in range(4) if along >> less]  # fewer on a small GPU
    rings = (3, 2) if eights <= 2 else (2,)  # a third stage was 2 % slower from 17 rows on
    return [Layout(down, way, tiles, eights, stages, halves) for way in ways for stages in rings]


@functools.cache
def kernel(layout):
    """v4 for one Layout."""
    down, along, tiles, eights, stages, halves = layout
    threads, x_pitch, w_pitch = layout.threads, layout.x_pitch, layout.w_pitch
    x_bytes, stage_bytes = layout.x_bytes, layout.stage_bytes
    tiles_a_warp = -(-tiles // down)
    uneven = tiles % down != 0  # the last tile of some warps is not there
    vectors, x_vectors = layout.step // 32, layout.step // 8  # of 16 bytes: in a row of the codes, in a row of x
    w_at_once, x_at_once = threads // vectors, threads // x_vectors  # rows
    most_w, most_x = -(-16 * tiles // w_at_once), -(-8 * eights // x_at_once)
    parts = 2 if halves else 1  # of a tile's columns that have an absmax of their own
    pieces = 2 // parts  # their length, in 32 columns
    sum_count, b_words, all_sums, scale_count = 4 * eights, 8 * eights, 4 * eights * tiles_a_warp, 2 * parts
    ring = 4 * TABLES
    last_stage = (stages - 1) * stage_bytes
    in_flight = stages - 2
    bytes_a_thread = max(1, 256 // threads)

    @cuda.jit(device=True, inline="always")
    def copy_rows(shared, to, pitch, data, sources, ahead, row, rows, most, at_once):
        """Set under way: 16 bytes of every at_once-th row, from `row` on, of as many as a stage has."""
        for j in range(most):
            if rows % at_once == 0 or j < most - 1 or int32(row + j * at_once) < rows:
                copy16(shared, int32(to + 4 * j * at_once * pitch), data, int32(sources[j] + ahead))

    @cuda.jit(device=True, inline="always")
    def copy_step(
        shared, w_to, packed, w_from, w_ahead, w_row, w_vector, k_32, x_to, x, x_from, x_ahead, x_row, x_vector, k_8
    ):
        """Set under way: this thread's share of the codes and of x that a step needs, where there are columns left."""
        if int32(w_ahead + w_vector) < k_32:
            copy_rows(shared, w_to, w_pitch, packed, w_from, w_ahead, w_row, 16 * tiles, most_w, w_at_once)
        if int32(x_ahead + x_vector) < k_8:
            copy_rows(shared, x_to, x_pitch, x, x_from, x_ahead, x_row, 8 * eights, most_x, x_at_once)
        copies_go()

    @cuda.jit(device=True, inline="always")
    def multiply_part(x, shared, words, part_of_tile, b, lane_bytes, a, products):
        """products = 16 rows of W, their codes in `words`, times the rows of x in b, over one absmax's columns."""
        for s in range(sum_count):
            products[s] = float32(0)
        for q in range(pieces):
            piece = pieces * part_of_tile + q
            for h in range(2):
                for r in range(2):  # rows g, g + 8
                    word = words[2 * piece + r]
                    a[r], a[r + 2] = (
                        pair_at(shared, word, 2 * h, lane_bytes),
                        pair_at(shared, word, 2 * h + 1, lane_bytes),
                    )
                for f in range(eights):
                    e = 8 * f + 4 * piece + 2 * h
                    multiply_tile(x, products, 4 * f, a[0], a[1], a[2], a[3], b[e], b[e + 1])

    @cuda.jit
    def v4(
        x, packed, absmax, codes, group_absmax, offset, code_map, levels, bias, y,
        rows, n, k, block_shift, group_shift, nested, has_bias,
    ):  # fmt: skip
        shared = pinned(cuda.shared.array(0, uint32), block_shift)
        words = cuda.local.array(4, uint32)
        coming = cuda.local.array(4, uint32)  # the next tile's
        a = cuda.local.array(4, uint32)
        b = cuda.local.array(b_words, uint32)
        products = cuda.local.array(sum_count, float32)
        sums = cuda.local.array(all_sums, float32)
        w_from = cuda.local.array(most_w, int32)
        x_from = cuda.local.array(most_x, int32)
        scale_row = cuda.local.array(2, int32)
        scales = cuda.local.array(scale_count, float32)  # of rows g, g + 8 in tile t of this warp
        read = cuda.local.array(scale_count, float32)  # the next step's, as they are stored
        coded = cuda.local.array(scale_count, uint32)
        pairs = cuda.local.array(bytes_a_thread, uint32)
        decoded = cuda.local.array(bytes_a_thread, float32)
        thread = int32(cuda.threadIdx.x)
        lane, warp = int32(thread & 31), int32(thread >> 5)
        g, t = int32(lane >> 2), int32(lane & 3)
        down_at, along_at = int32(warp % down), int32(warp // down)
        lane_bytes = uint32(4 * lane)
        x_rows, k_8, k_32, last_row = int32(rows), int32(k >> 3), int32(k >> 5), int32(n - 1)
        shift, shift_2 = int32(block_shift - 5), int32(group_shift)
        row_0 = int32(cuda.blockIdx.x * 16 * tiles)
        row_count = min(int32(16 * tiles), int32(last_row + 1 - row_0))
        steps = int32((k_32 + 2 * along - 1) // (2 * along))
        start = int32(shared_start(shared) + ring)
        w_row, w_vector = int32(thread // vectors), int32(thread % vectors)
        x_row, x_vector = int32(thread // x_vectors), int32(thread % x_vectors)
        for j in range(most_w):
            w_from[j] = int32(min(int32(row_0 + w_row + j * w_at_once), last_row) * k_32 + w_vector)
        for j in range(most_x):
            x_from[j] = int32(min(int32(x_row + j * x_at_once), int32(x_rows - 1)) * k_8 + x_vector)
        x_to = int32(start + 4 * (x_row * x_pitch + 4 * x_vector))
        w_to = int32(start + x_bytes + 4 * (w_row * w_pitch + 4 * w_vector))
        kernel_before_done()
        next_kernel_may_start()
        read_tables(x, levels, code_map, nested, thread, threads, pairs, decoded)
        smallest = offset[0]
        w_ahead, x_ahead = int32(0), int32(0)
        for s in range(stages - 1):
            copy_step(
                shared, int32(w_to + s * stage_bytes), packed, w_from, w_ahead, w_row, w_vector, k_32,
                int32(x_to + s * stage_bytes), x, x_from, x_ahead, x_row, x_vector, k_8,
            )  # fmt: skip
            w_ahead, x_ahead = int32(w_ahead + vectors), int32(x_ahead + x_vectors)
        for h in range(2):
            tile = int32(down * min(t, int32(tiles_a_warp - 1)) + down_at)
            scale_row[h] = int32(min(int32(row_0 + 16 * tile + 8 * h + g), last_row) * k_32)
        column_32 = int32(2 * along_at)
        read_scales(
            scale_count, absmax, codes, group_absmax, nested, scale_row, column_32, k_32, shift, shift_2, read, coded
        )
        fill_tables(shared, nested, thread, threads, pairs, decoded)
        for s in range(all_sums):
            sums[s] = float32(0)
        b_at = int32(start + 4 * (g * x_pitch + 32 * along_at + 4 * t))
        a_at = int32(start + x_bytes + 4 * ((16 * down_at + (lane & 15)) * w_pitch + 8 * along_at + 4 * (lane >> 4)))
        last_at = int32(a_at + 64 * down * (tiles_a_warp - 1) * w_pitch)
        if uneven and int32(down * (tiles_a_warp - 1) + down_at) >= tiles:
            last_at = a_at  # not there: anything
        use, fill = int32(0), int32(last_stage)  # the stages, in bytes from the first
        for _ in range(steps):
            copies_done(in_flight)
            cuda.syncthreads()
            copy_step(
                shared, int32(w_to + fill), packed, w_from, w_ahead, w_row, w_vector, k_32,
                int32(x_to + fill), x, x_from, x_ahead, x_row, x_vector, k_8,
            )  # fmt: skip
            w_ahead, x_ahead = int32(w_ahead + vectors), int32(x_ahead + x_vectors)
            fill = int32(fill + stage_bytes) if fill < last_stage else int32(0)
            if column_32 < k_32:
                load_matrices(shared, int32((a_at if tiles_a_warp > 1 else last_at) + use), coming, 0)
                for f in range(eights):
                    for piece in range(2):
                        load16_shared(shared, int32(b_at + use + 32 * f * x_pitch + 64 * piece), b, 8 * f + 4 * piece)
                for s in range(scale_count):
                    scales[s] = read[s]
                    if nested:
                        scales[s] = multiply(bits_float(shared[place_of(coded[s])]), read[s]) + smallest
                column_32 = int32(column_32 + 2 * along)
                read_scales(
                    scale_count, absmax, codes, group_absmax, nested,
                    scale_row, column_32, k_32, shift, shift_2, read, coded,
                )  # fmt: skip
                for m in range(tiles_a_warp):
                    for e in range(4):
                        words[e] = coming[e]
                    if m + 2 < tiles_a_warp:
                        load_matrices(shared, int32(a_at + use + 64 * down * (m + 1) * w_pitch), coming, 0)
                    elif m + 1 < tiles_a_warp:
                        load_matrices(shared, int32(last_at + use), coming, 0)
                    if not uneven or m < tiles_a_warp - 1 or int32(down * m + down_at) < tiles:
                        for p in range(parts):
                            low = from_lane(scales[2 * p], int32((lane & 28) + m))
                            high = from_lane(scales[2 * p + 1], int32((lane & 28) + m))
                            multiply_part(x, shared, words, p, b, lane_bytes, a, products)
                            for s in range(sum_count):
                                sums[m * sum_count + s] += products[s] * (low if s % 4 < 2 else high)
            use = int32(use + stage_bytes) if use < last_stage else int32(0)
        copies_done(0)
        cuda.syncthreads()
        pitch = int32(16 * tiles + 4)
        for m in range(tiles_a_warp):
            tile = int32(down * m + down_at)
            if tile < tiles:
                put_down(shared, sums, m * sum_count, eights, along_at, 0, x_rows, pitch, int32(16 * tile + g), t)
        cuda.syncthreads()
        add_up(shared, along, x_rows, pitch, thread, threads, row_0, row_count, n, bias, has_bias, y)

    return v4
