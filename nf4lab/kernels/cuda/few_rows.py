"""y = x W^T + bias for 1 to 8 rows of x and a packed 4-bit weight W (n, k): v5, the one in use from sm_90 on.

Sixteen rows of W lie one after another in memory. So a thread block takes its tiles of 16 rows one by one, 4,096
columns at a time, and each of its 16 warps has 256 of these columns: what the warp needs of x stays in its registers
until the block's last tile has passed, and only then come the next 4,096. The warps take turns to order a coming tile,
each lane a row of it, up to 2 KB in one bulk copy; a barrier counts the bytes that have come (`full`), another the
warps that are done with a stage (`empty`).

            256 columns a warp: 4 blocks of 64
            warp 0   warp 1    …   warp 15
    row 0   ┌────────┬────────┬──┬────────┐  ordered by lane 0
    row 1   │        │        │  │        │  ordered by lane 1      4 stages of 33 KB: three tiles on their way
      …     │        │        │  │        │    …                    while the fourth is multiplied
    row 15  └────────┴────────┴──┴────────┘  ordered by lane 15

The multiplication is that of `gemm_kernels`. Lane (g, t) reads the absmax of rows g and g + 8 in block t, one tile
ahead. The warps' sums of a tile are put down in shared memory and added up when all tiles are through, always in the
same order.
"""

import functools

from numba import config, cuda, float32, int32, uint32

from .gemm_kernels import TABLES, fill_tables, place_of, read_tables
from .gemv_kernels import finish
from .intrinsics import (
    barrier_arrive,
    barrier_init,
    barrier_wait,
    barriers_ready,
    bits_float,
    copy_bulk,
    float_bits,
    from_lane,
    kernel_before_done,
    load16,
    load_matrices,
    multiply,
    multiply_tile,
    next_kernel_may_start,
    pair_at,
    pinned,
    shared_start,
    shifted,
    sync_warp,
)

WARPS = 2 if config.ENABLE_CUDASIM else 16  # the simulator starts a thread of the host for each
THREADS = 32 * WARPS
BYTES_A_THREAD = max(1, 256 // THREADS)
BLOCKS = 4  # of 64 columns, that a warp takes of a tile
X_WORDS = 8 * BLOCKS  # that a lane holds of x
SEGMENT = 64 * BLOCKS * WARPS
PITCH = SEGMENT // 8 + 4  # words from row to row of a stage: 8 rows meet in no bank
STAGE = 16 * PITCH


@functools.cache
def kernel(stages):
    """v5 with a ring of so many stages."""
    full = TABLES
    empty = full + 2 * stages
    ring = full + 16
    sums_at = ring + stages * STAGE

    @cuda.jit(device=True, inline="always")
    def order(shared, packed, number, tile_0, tiles, last_row, columns, lane):
        """Order the tile and segment that come number-th, as soon as their stage is free: lane l row l."""
        stage = int32(number % stages)
        if number >= stages:
            barrier_wait(shared, empty + 2 * stage, int32((number // stages - 1) & 1))
        segment = int32(number // tiles)
        first = int32(segment * SEGMENT)
        count = int32(min(int32(columns - first), int32(SEGMENT)) >> 1)
        if lane < 16:
            row = min(int32(16 * (tile_0 + number - segment * tiles) + lane), last_row)
            source = int32((row * (columns >> 5)) + (first >> 5))
            copy_bulk(shared, ring + stage * STAGE + lane * PITCH, packed, source, count, full + 2 * stage)

    @cuda.jit(device=True, inline="always")
    def read_x(x, x_rows, columns, first, g, t, b):
        """Set under way: row g of x in this lane's columns of the warp's blocks; zeros past the end."""
        row = int32(min(g, int32(x_rows - 1)) * (columns >> 3))
        for i in range(BLOCKS):
            for piece in range(2):
                column = int32(first + 64 * i + 32 * piece + 8 * t)
                if column < columns:
                    load16(x, int32(row + (column >> 3)), b, 8 * i + 4 * piece)
                else:
                    for e in range(4):
                        b[8 * i + 4 * piece + e] = uint32(0)

    @cuda.jit(device=True, inline="always")
    def read_scales(
        absmax, codes, group_absmax, nested, row, last_row, k_32, column_32, shift, group_shift, read, coded
    ):
        """Set under way: the absmax of rows `row` and row + 8 in the block at 32 column_32, or its code and group."""
        for h in range(2):
            index = shifted(int32(min(int32(row + 8 * h), last_row) * k_32 + min(column_32, int32(k_32 - 1))), shift)
            if nested:
                coded[h] = codes[index]
                read[h] = group_absmax[shifted(index, group_shift)]
            else:
                read[h] = absmax[index]

    @cuda.jit
    def v5(
        x, packed, absmax, codes, group_absmax, offset, code_map, levels, bias, y,
        rows, n, k, block_shift, group_shift, nested, has_bias, tiles,
    ):  # fmt: skip
        shared = pinned(cuda.shared.array(0, uint32), block_shift)
        words = cuda.local.array(4, uint32)
        a = cuda.local.array(4, uint32)
        b = cuda.local.array(X_WORDS, uint32)
        part = cuda.local.array(4, float32)
        total = cuda.local.array(4, float32)
        scales = cuda.local.array(2, float32)  # of rows g and g + 8 in block t, for this tile
        read = cuda.local.array(2, float32)  # the next tile's, as they are stored
        coded = cuda.local.array(2, uint32)
        pairs = cuda.local.array(BYTES_A_THREAD, uint32)
        decoded = cuda.local.array(BYTES_A_THREAD, float32)
        thread = int32(cuda.threadIdx.x)
        lane, warp = int32(thread & 31), int32(thread >> 5)
        g, t = int32(lane >> 2), int32(lane & 3)
        lane_bytes = uint32(4 * lane)
        x_rows, columns, k_32, last_row = int32(rows), int32(k), int32(k >> 5), int32(n - 1)
        shift, shift_2 = int32(block_shift - 5), int32(group_shift)
        tile_0 = int32(cuda.blockIdx.x * tiles)
        tiles = min(int32(tiles), int32(((last_row + 16) >> 4) - tile_0))
        work = int32(tiles * ((columns + (SEGMENT - 1)) // SEGMENT))
        if thread == 0:
            for s in range(stages):
                barrier_init(shared, full + 2 * s, 16)
                barrier_init(shared, empty + 2 * s, WARPS)
            barriers_ready()
        cuda.syncthreads()
        kernel_before_done()
        next_kernel_may_start()
        read_tables(x, levels, code_map, nested, thread, THREADS, pairs, decoded)
        smallest = offset[0]
        for s in range(warp, min(work, int32(stages - 1)), WARPS):
            order(shared, packed, int32(s), tile_0, tiles, last_row, columns, lane)
        first = int32(64 * BLOCKS * warp)  # this warp's first column in the segment
        read_x(x, x_rows, columns, first, g, t, b)
        row, column_32 = int32(16 * tile_0 + g), int32((first >> 5) + 2 * t)
        read_scales(absmax, codes, group_absmax, nested, row, last_row, k_32, column_32, shift, shift_2, read, coded)
        fill_tables(shared, nested, thread, THREADS, pairs, decoded)
        cuda.syncthreads()
        codes_at = int32(shared_start(shared) + 4 * (ring + (lane & 15) * PITCH + 8 * BLOCKS * warp + 4 * (lane >> 4)))
        tile, stage, turn = int32(0), int32(0), int32(0)
        for now in range(work):
            for h in range(2):
                scales[h] = read[h]
                if nested:
                    scales[h] = multiply(bits_float(shared[place_of(coded[h])]), read[h]) + smallest
            next_tile, next_first = int32(tile + 1), first
            if next_tile == tiles:
                next_tile, next_first = int32(0), int32(first + SEGMENT)
            if int32(now + 1) < work:
                row, column_32 = int32(16 * (tile_0 + next_tile) + g), int32((next_first >> 5) + 2 * t)
                read_scales(
                    absmax, codes, group_absmax, nested, row, last_row, k_32, column_32, shift, shift_2, read, coded
                )
            barrier_wait(shared, full + 2 * stage, turn)
            for e in range(4):
                total[e] = float32(0)
            at = int32(codes_at + 4 * STAGE * stage)
            for i in range(BLOCKS):
                load_matrices(shared, int32(at + 32 * i), words, 0)
                for e in range(4):
                    part[e] = float32(0)
                for piece in range(2):
                    for h in range(2):
                        for r in range(2):  # rows g, g + 8
                            a[r] = pair_at(shared, words[2 * piece + r], 2 * h, lane_bytes)
                            a[r + 2] = pair_at(shared, words[2 * piece + r], 2 * h + 1, lane_bytes)
                        e = 8 * i + 4 * piece + 2 * h
                        multiply_tile(x, part, 0, a[0], a[1], a[2], a[3], b[e], b[e + 1])
                for e in range(4):
                    total[e] += part[e] * from_lane(scales[e >> 1], int32((lane & 28) + i))
            sync_warp()
            if lane == 0:
                barrier_arrive(shared, empty + 2 * stage, 1)
            if warp == now % WARPS and int32(now + stages - 1) < work:
                order(shared, packed, int32(now + stages - 1), tile_0, tiles, last_row, columns, lane)
            for e in range(4):
                x_row = int32(2 * t + (e & 1))
                if x_row < x_rows:
                    place = uint32(sums_at + ((tile * WARPS + warp) * x_rows + x_row) * 16 + g + 8 * (e >> 1))
                    before = bits_float(shared[place]) if now >= tiles else float32(0)
                    shared[place] = float_bits(before + total[e])
            if next_first != first:
                first = next_first
                read_x(x, x_rows, columns, first, g, t, b)
            tile = next_tile
            stage = int32(stage + 1)
            if stage == stages:
                stage, turn = int32(0), int32(turn ^ 1)
        cuda.syncthreads()
        for i in range(thread, int32(16 * tiles * x_rows), THREADS):
            tile = int32(int32(i >> 4) // x_rows)
            x_row = int32(int32(i >> 4) - tile * x_rows)
            row = int32(16 * (tile_0 + tile) + (i & 15))
            if row <= last_row:
                sum_of_all = float32(0)
                for w in range(WARPS):
                    place = uint32(sums_at + ((tile * WARPS + w) * x_rows + x_row) * 16 + (i & 15))
                    sum_of_all += bits_float(shared[place])
                finish(y, bias, has_bias, x_row * n + row, row, sum_of_all)

    return v5


def shared_bytes(rows, tiles, stages):
    return 4 * (TABLES + 16 + stages * STAGE + WARPS * 16 * tiles * rows)
