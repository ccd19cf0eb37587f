"""y = x W^T + bias for 1 to 64 rows of x and a packed 4-bit weight W (n, k): v4, in use from sm_80 on.

A thread block takes up to 16 tiles of 16 rows of W and all their columns, in steps. What the next steps need (codes,
absmax, x) is copied into shared memory while this one is multiplied: a ring of `stages`. In a step each warp takes
some of the tiles and 64 columns:

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

A tile's four steps share a block of absmax, so their sum is multiplied by it once, in float32. At the end the warps
that hold other columns of the same rows add up through shared memory, always in the same order.
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
    load16,
    load_matrices,
    multiply,
    multiply_tile,
    pack_like,
    pair_at,
    pinned,
    shifted,
    sync_warp,
)

PAIRS = 256 * 64  # words: for each byte a copy of its pair for every lane, and 32 words unused
COLUMNS = 64  # of W that a warp takes in a step


class Layout(NamedTuple):
    """How a thread block is cut: warps over rows and columns, tiles a warp, eights of x's rows, stages of the ring."""

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
    def scale_words(self):
        """Room for the absmax of a step: each warp has its own."""
        return self.threads // 32 * 16 * self.tiles * (2 if self.halves else 1)

    def shared_bytes(self, rows, tiles):
        stage = 16 * tiles * (self.step // 8 + 4) + 8 * self.eights * (self.step // 2 + 16)  # codes, x
        sums = self.warps_along * rows * (16 * tiles + 4)
        return 4 * (PAIRS + self.scale_words + max(self.stages * stage, sums))


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

    Between the pairs, at place_of(code), what an 8-bit code of a double-quantized absmax stands for.
    """
    for i in range(max(1, 256 // threads)):
        byte = int32((thread + i * threads) & 255)
        for copy in range(0, 32, max(1, threads >> 8)):
            shared[uint32(64 * byte + ((copy + (thread >> 8) + thread) & 31))] = pairs[i]
        if nested and thread < 256:
            shared[place_of(uint32(byte))] = float_bits(decoded[i])


@cuda.jit(device=True, inline="always")
def place_of(code):
    return uint32(uint32(64) * code + uint32(32) + (code & uint32(31)))


@cuda.jit(device=True, inline="always")
def copy_rows(shared, to, pitch, data, source, stride, left, most, at_once):
    """Set under way: 16 bytes of every at_once-th row, `left` rows being left and at most `most` of them ours."""
    for j in range(most):
        if int32(j * at_once) < left:
            copy16(shared, int32(to + j * at_once * pitch), data, int32(source + j * at_once * stride))


def layouts(eights, tiles, block_size):
    """Ways to cut a block of so many tiles, and eights of x's rows: the fastest first."""
    halves = block_size < 64
    if config.ENABLE_CUDASIM:
        return [Layout(1, 2, tiles, eights, 2, halves)] if tiles <= 2 else []
    fewest = next((few for few in (1, 2, 4) if 2 * few >= tiles), None)
    ways = (8, 4, 2, 1) if eights <= 2 else (4, 2, 1)  # 16 warps, or 8 with twice the registers; fewer on a small GPU
    return [Layout(2, along, fewest, eights, stages, halves) for along in ways for stages in (4, 3, 2) if fewest]


@functools.cache
def kernel(layout):
    """v4 for one Layout."""
    down, along, tiles_a_warp, eights, stages, halves = layout
    threads, step = layout.threads, layout.step
    vectors, x_vectors = step // 32, step // 8  # of 16 bytes: in a row of the codes, in a row of x
    w_pitch, x_pitch = step // 8 + 4, step // 2 + 16  # words; no bank is met twice
    w_at_once, x_at_once = threads // vectors, threads // x_vectors  # rows
    most_w, most_x = -(-16 * down * tiles_a_warp // w_at_once), -(-8 * eights // x_at_once)
    parts = 2 if halves else 1  # of a tile's columns that have an absmax of their own
    part_32 = 2 // parts  # their length, in 32 columns
    sum_count, b_words, all_sums = 4 * eights, 8 * eights, 4 * eights * tiles_a_warp
    warp_scales = 16 * tiles_a_warp * parts
    scales_a_lane = -(-warp_scales // 32)
    scales_at = PAIRS
    ring = PAIRS + layout.scale_words
    x_words = 8 * eights * x_pitch  # what is multiplied of rows that are not there is left
    in_flight = stages - 2
    bytes_a_thread = max(1, 256 // threads)
    behind = stages - 1

    @cuda.jit(device=True, inline="always")
    def read_scales(
        absmax,
        codes,
        group_absmax,
        nested,
        row_0,
        last_row,
        down_at,
        lane,
        k_32,
        column_32,
        shift,
        shift_2,
        read,
        coded,
    ):
        """Set under way: this lane's share of the absmax that its warp needs in a step, or their codes and groups."""
        for j in range(scales_a_lane):
            i = int32(32 * j + lane)
            m = int32(i >> 4)  # which tile, or which half of one
            row = min(int32(row_0 + 16 * (down * (m // parts) + down_at) + (i & 15)), last_row)
            column = min(int32(column_32 + part_32 * (m % parts)), int32(k_32 - 1))
            index = shifted(int32(row * k_32 + column), shift)
            if nested:
                coded[j] = codes[index]
                read[j] = group_absmax[shifted(index, shift_2)]
            else:
                read[j] = absmax[index]

    @cuda.jit
    def v4(
        x, packed, absmax, codes, group_absmax, offset, code_map, levels, bias, y,
        rows, n, k, block_shift, group_shift, nested, has_bias, tiles,
    ):  # fmt: skip
        shared = pinned(cuda.shared.array(0, uint32), block_shift)
        words = cuda.local.array(4, uint32)
        a = cuda.local.array(4, uint32)
        b = cuda.local.array(b_words, uint32)
        part = cuda.local.array(sum_count, float32)
        sums = cuda.local.array(all_sums, float32)
        read = cuda.local.array(scales_a_lane, float32)  # absmax of the next step, as they are stored
        coded = cuda.local.array(scales_a_lane, uint32)
        pairs = cuda.local.array(bytes_a_thread, uint32)
        decoded = cuda.local.array(bytes_a_thread, float32)
        thread = int32(cuda.threadIdx.x)
        lane, warp = thread & 31, thread >> 5
        g, t = lane >> 2, lane & 3
        down_at, along_at = warp % down, warp // down
        lane_bytes = uint32(4 * lane)
        x_rows, columns, k_32, last_row = int32(rows), int32(k), int32(k >> 5), int32(n - 1)
        shift, shift_2 = int32(block_shift - 5), int32(group_shift)
        row_count = int32(16 * tiles)
        row_0 = int32(cuda.blockIdx.x * row_count)
        row_count = min(row_count, int32(int32(n) - row_0))
        x_at = int32(16 * tiles * w_pitch)  # in a stage: codes, x
        stage_words = int32(x_at + x_words)
        steps = int32((columns + step - 1) // step)
        w_row, w_vector = int32(thread // vectors), int32(thread % vectors)
        x_row, x_vector = int32(thread // x_vectors), int32(thread % x_vectors)
        w_left, x_left = int32(row_count - w_row), int32(x_rows - x_row)
        w_from = int32((row_0 + w_row) * k_32 + w_vector)
        x_from = int32(x_row * (columns >> 3) + x_vector)
        w_to = int32(ring + w_row * w_pitch + 4 * w_vector)
        x_to = int32(ring + x_at + x_row * x_pitch + 4 * x_vector)
        my_scales = int32(scales_at + warp * warp_scales)
        column_32 = int32(2 * along_at)
        smallest = offset[0]
        read_tables(x, levels, code_map, nested, thread, threads, pairs, decoded)
        for s in range(all_sums):
            sums[s] = float32(0)
        last = int32(behind * stage_words)
        fill, use = int32(0), int32(0)  # the stages, in words from the first
        for ahead in range(int32(steps + behind)):
            if ahead >= behind:
                copies_done(in_flight)
                cuda.syncthreads()
            if ahead < steps:
                column = int32(ahead * step)
                if int32(column + 32 * w_vector) < columns:
                    source = int32(w_from + ahead * vectors)
                    copy_rows(shared, int32(fill + w_to), w_pitch, packed, source, k_32, w_left, most_w, w_at_once)
                if int32(column + 8 * x_vector) < columns:
                    source = int32(x_from + ahead * x_vectors)
                    copy_rows(shared, int32(fill + x_to), x_pitch, x, source, columns >> 3, x_left, most_x, x_at_once)
                fill = int32(fill + stage_words) if fill < last else int32(0)
            copies_go()
            if ahead == 0:
                read_scales(
                    absmax,
                    codes,
                    group_absmax,
                    nested,
                    row_0,
                    last_row,
                    down_at,
                    lane,
                    k_32,
                    column_32,
                    shift,
                    shift_2,
                    read,
                    coded,
                )
                fill_tables(shared, nested, thread, threads, pairs, decoded)
            now = int32(ahead - behind)
            if now >= 0:
                at = int32(ring + use)
                use = int32(use + stage_words) if use < last else int32(0)
                for j in range(scales_a_lane):
                    i = int32(32 * j + lane)
                    if nested:
                        read[j] = multiply(bits_float(shared[place_of(coded[j])]), read[j]) + smallest
                    if i < warp_scales:
                        shared[uint32(my_scales + i)] = float_bits(read[j])
                sync_warp()
                column_32 = int32(column_32 + vectors)
                read_scales(
                    absmax,
                    codes,
                    group_absmax,
                    nested,
                    row_0,
                    last_row,
                    down_at,
                    lane,
                    k_32,
                    column_32,
                    shift,
                    shift_2,
                    read,
                    coded,
                )
                if int32(now * step + 64 * along_at) < columns:
                    x_vector_at = int32((at + x_at + g * x_pitch + 32 * along_at + 4 * t) >> 2)
                    for f in range(eights):
                        for piece in range(2):
                            load16(shared, int32(x_vector_at + 2 * f * x_pitch + 4 * piece), b, 8 * f + 4 * piece)
                    for m in range(tiles_a_warp):
                        tile = int32(down * m + down_at)
                        if int32(16 * tile) < row_count:
                            row = int32(16 * tile + (lane & 15))
                            load_matrices(shared, at + row * w_pitch + 8 * along_at + 4 * (lane >> 4), words)
                            for s in range(sum_count):
                                part[s] = float32(0)
                            scale_at = int32(my_scales + 16 * parts * m + g)
                            for piece in range(2):
                                for h in range(2):
                                    for r in range(2):  # rows g, g + 8
                                        a[r] = pair_at(shared, words[2 * piece + r], 2 * h, lane_bytes)
                                        a[r + 2] = pair_at(shared, words[2 * piece + r], 2 * h + 1, lane_bytes)
                                    for f in range(eights):
                                        e = 8 * f + 4 * piece + 2 * h
                                        multiply_tile(x, part, 4 * f, a[0], a[1], a[2], a[3], b[e], b[e + 1])
                                if halves or piece == 1:
                                    low = bits_float(shared[uint32(scale_at + 16 * piece * (parts - 1))])
                                    high = bits_float(shared[uint32(scale_at + 16 * piece * (parts - 1) + 8)])
                                    for f in range(eights):
                                        for e in range(4):
                                            s = m * sum_count + 4 * f + e
                                            sums[s] += part[4 * f + e] * (low if e < 2 else high)
                                            part[4 * f + e] = float32(0)
                sync_warp()
        copies_done(0)
        cuda.syncthreads()
        pitch = int32(16 * tiles) + 4
        for m in range(tiles_a_warp):
            tile = int32(down * m + down_at)
            if int32(16 * tile) < row_count:
                for f in range(eights):
                    for e in range(4):
                        x_row = 8 * f + 2 * t + (e & 1)
                        if x_row < x_rows:
                            place = ring + (along_at * x_rows + x_row) * pitch + 16 * tile + g + 8 * (e >> 1)
                            shared[uint32(place)] = float_bits(sums[m * sum_count + 4 * f + e])
        cuda.syncthreads()
        for x_row in range(warp, x_rows, threads // 32):
            for row in range(lane, row_count, 32):
                total = float32(0)
                for w in range(along):
                    total += bits_float(shared[uint32(int32(ring + (w * x_rows + x_row) * pitch + row))])
                finish(y, bias, has_bias, x_row * n + row_0 + row, row_0 + row, total)

    return v4
