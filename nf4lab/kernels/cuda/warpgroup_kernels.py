"""y = x W^T + bias for 1 to 128 rows of x and a packed 4-bit weight W (n, k): v6, in use above v4's rows on sm_90.

Hopper's tensor cores take their steps from four warps at once, a warpgroup: A (64 rows of W, 16 columns) from its
registers, B (16 columns, all rows of x) straight from shared memory. So nobody reads x into registers, a step covers
up to 128 rows of x, and while one warpgroup's step is on its way the others look levels up.

            columns of W: 128 a step                    one warpgroup: 4 tiles of 16 rows, a tile a warp
            warpgroups 0, 1   warpgroups 2, 3 …
    tiles   ┌───────────────┬───────────────┬──         A   lane (g, t): rows g and g + 8 of its warp's tile;
    0 … 3   │ warpgroup 0   │ warpgroup 2   │               of 16 columns 2t, 2t + 1 and 2t + 8, 2t + 9
    4 … 7   │ warpgroup 1   │ warpgroup 3   │           B   row n: 64 columns are 128 bytes; piece p of 16 bytes
            └───────────────┴───────────────┴──             lies at place p ^ (n & 7): no bank is met twice

The columns must keep their order here, for B is read as it was copied. So lane (g, t) gets whole words of codes, eight
columns each, as its three neighbours do, and takes byte t of each. The warpgroups of the same columns share a ring of
stages and wait for each other only. Table, absmax and the sum at the end are those of `gemm_kernels`.
"""

import functools
from typing import NamedTuple

from numba import config, cuda, float32, int32, uint32

from .gemm_kernels import PAIRS, add_up, fill_tables, place_of, put_down, read_scales, read_tables
from .intrinsics import (
    bits_float,
    copies_done,
    copies_go,
    copies_seen,
    copy16,
    from_lane,
    kernel_before_done,
    load16_shared,
    multiply,
    multiply_by_warpgroup,
    next_kernel_may_start,
    pair_selected,
    pinned,
    shared_start,
    sync_threads,
)

MOST_ROWS = 128
WARPGROUP = 128  # threads
BLOCKS = 2  # of 64 columns, in a step
W_VECTORS, X_VECTORS = 2 * BLOCKS, 8 * BLOCKS  # 16 bytes each: in a step's row of codes, of x
W_PITCH = 8 * BLOCKS + 4  # words from row to row of the codes: 8 rows meet in no bank
SWIZZLE = 1024  # bytes: where the pattern of B's pieces begins anew


class Layout(NamedTuple):
    """How a thread block is cut: warpgroups over tiles and over columns, tiles, eights of x's rows, stages."""

    down: int
    along: int
    tiles: int
    eights: int
    stages: int

    @property
    def threads(self):
        return WARPGROUP * self.down * self.along

    @property
    def x_bytes(self):
        """Bytes of x in a stage."""
        return BLOCKS * SWIZZLE * self.eights

    @property
    def stage_bytes(self):
        return -(-(self.x_bytes + 4 * 16 * self.tiles * W_PITCH) // SWIZZLE) * SWIZZLE

    def shared_bytes(self, rows):
        sums = 4 * self.along * rows * (16 * self.tiles + 4)
        return 4 * PAIRS + max(self.along * self.stages * self.stage_bytes, sums)


def layouts(eights, tiles):
    """Ways to cut a block of so many tiles, and eights of x's rows: the fastest first."""
    if tiles > 8:
        return []
    down = 2 if tiles > 4 else 1
    along = 1 if config.ENABLE_CUDASIM else (4 if eights <= 8 else 2) // down  # more rows need more registers
    ways = [along >> less for less in range(3) if along >> less]  # fewer where shared memory is short
    return [Layout(down, way, tiles, eights, stages) for way in ways for stages in (3, 2)]


@functools.cache
def kernel(layout):
    """v6 for one Layout."""
    down, along, tiles, eights, stages = layout
    threads, x_bytes, stage_bytes = layout.threads, layout.x_bytes, layout.stage_bytes
    together = WARPGROUP * down  # threads that share columns
    w_at_once, x_at_once = together // W_VECTORS, together // X_VECTORS  # rows
    most_w, most_x = -(-16 * tiles // w_at_once), -(-8 * eights // x_at_once)
    sum_count = 4 * eights
    ring = 4 * PAIRS
    last_stage = (stages - 1) * stage_bytes
    in_flight = stages - 2
    bytes_a_thread = max(1, 256 // threads)
    w_on, x_on = 2 * BLOCKS * along, 8 * BLOCKS * along  # vectors from a step to the next of the same warpgroups

    @cuda.jit(device=True, inline="always")
    def copy_step(shared, w_to, packed, w_from, w_ahead, w_row, k_32, x_to, x, x_from, x_ahead, x_row, x_rows, k_8):
        """Set under way: this thread's share of the codes and of x that a step needs, where there are columns left."""
        if w_ahead < k_32:
            for j in range(most_w):
                if int32(w_row + j * w_at_once) < 16 * tiles:
                    copy16(shared, int32(w_to + 4 * j * w_at_once * W_PITCH), packed, int32(w_from[j] + w_ahead))
        if x_ahead < k_8:
            for j in range(most_x):
                if int32(x_row + j * x_at_once) < x_rows:
                    source = int32(x_from + j * x_at_once * k_8 + x_ahead)
                    copy16(shared, int32(x_to + 128 * j * x_at_once), x, source)
        copies_go()

    @cuda.jit(device=True, inline="always")
    def look_up(shared, at, selector, lane_bytes, words, a):
        """A in the type of x: this lane's levels in 64 columns of two rows, whose codes lie at `at`."""
        for piece in range(2):
            for h in range(2):
                load16_shared(shared, int32(at + 16 * piece + 32 * h * W_PITCH), words, 4 * h)
            for step in range(2):
                for e in range(4):  # rows g, g + 8; then the same rows, eight columns on
                    word = words[4 * (e & 1) + 2 * step + (e >> 1)]
                    a[8 * piece + 4 * step + e] = pair_selected(shared, word, selector, lane_bytes)

    @cuda.jit
    def v6(
        x, packed, absmax, codes, group_absmax, offset, code_map, levels, bias, y,
        rows, n, k, block_shift, group_shift, nested, has_bias,
    ):  # fmt: skip
        shared = pinned(cuda.shared.array(0, uint32), block_shift)
        words = cuda.local.array(8, uint32)
        a = cuda.local.array(16, uint32)
        products = cuda.local.array(sum_count, float32)
        sums = cuda.local.array(sum_count, float32)
        w_from = cuda.local.array(most_w, int32)
        scale_row = cuda.local.array(2, int32)
        scales = cuda.local.array(2, float32)  # of rows g and g + 8 in the step's block t & 1
        read = cuda.local.array(2, float32)  # the next step's, as they are stored
        coded = cuda.local.array(2, uint32)
        pairs = cuda.local.array(bytes_a_thread, uint32)
        decoded = cuda.local.array(bytes_a_thread, float32)
        thread = int32(cuda.threadIdx.x)
        lane, warp = int32(thread & 31), int32(thread >> 5)
        g, t = int32(lane >> 2), int32(lane & 3)
        tile, along_at, member = int32(warp % (4 * down)), int32(warp // (4 * down)), int32(thread % together)
        lane_bytes, selector = uint32(4 * lane), uint32(0x7604 + 16 * t)
        x_rows, k_8, k_32, last_row = int32(rows), int32(k >> 3), int32(k >> 5), int32(n - 1)
        shift, shift_2 = int32(block_shift - 5), int32(group_shift)
        row_0 = int32(cuda.blockIdx.x * 16 * tiles)
        row_count = min(int32(16 * tiles), int32(last_row + 1 - row_0))
        steps = int32((int32((k_32 + (2 * BLOCKS - 1)) // (2 * BLOCKS)) - along_at + (along - 1)) // along)
        start = int32(shared_start(shared) + ring + along_at * stages * stage_bytes)
        w_row, w_vector = int32(member // W_VECTORS), int32(member % W_VECTORS)
        x_row, x_vector = int32(member // X_VECTORS), int32(member % X_VECTORS)
        for j in range(most_w):
            w_from[j] = int32(min(int32(row_0 + w_row + j * w_at_once), last_row) * k_32)
        w_to = int32(start + x_bytes + 4 * (w_row * W_PITCH + 4 * w_vector))
        piece = int32((x_vector & 7) ^ (x_row & 7))
        x_to = int32(start + (x_vector >> 3) * (SWIZZLE * eights) + 128 * x_row + 16 * piece)
        w_ahead, x_ahead = int32(2 * BLOCKS * along_at + w_vector), int32(8 * BLOCKS * along_at + x_vector)
        kernel_before_done()
        next_kernel_may_start()
        read_tables(x, levels, code_map, nested, thread, threads, pairs, decoded)
        smallest = offset[0]
        for s in range(stages - 1):
            copy_step(
                shared, int32(w_to + s * stage_bytes), packed, w_from, w_ahead, w_row, k_32,
                int32(x_to + s * stage_bytes), x, int32(x_row * k_8), x_ahead, x_row, x_rows, k_8,
            )  # fmt: skip
            w_ahead, x_ahead = int32(w_ahead + w_on), int32(x_ahead + x_on)
        for e in range(16):
            a[e] = uint32(0)  # of a tile that is not there
        for h in range(2):
            coded[h], read[h] = uint32(0), float32(0)  # of a block past the end
            scale_row[h] = int32(min(int32(row_0 + 16 * tile + 8 * h + g), last_row) * k_32)
        column_32 = int32(2 * BLOCKS * along_at)
        scale_at = int32(column_32 + 2 * (t & 1))
        read_scales(2, absmax, codes, group_absmax, nested, scale_row, scale_at, k_32, shift, shift_2, read, coded)
        fill_tables(shared, nested, thread, threads, pairs, decoded)
        for s in range(sum_count):
            sums[s] = float32(0)
        a_at = int32(start + x_bytes + 4 * (16 * tile + g) * W_PITCH)
        cuda.syncthreads()
        use, fill = int32(0), int32(last_stage)  # the stages, in bytes from the first
        for _ in range(steps):
            copies_done(in_flight)
            copies_seen()
            sync_threads(int32(along_at + 1), together)
            copy_step(
                shared, int32(w_to + fill), packed, w_from, w_ahead, w_row, k_32,
                int32(x_to + fill), x, int32(x_row * k_8), x_ahead, x_row, x_rows, k_8,
            )  # fmt: skip
            w_ahead, x_ahead = int32(w_ahead + w_on), int32(x_ahead + x_on)
            fill = int32(fill + stage_bytes) if fill < last_stage else int32(0)
            for h in range(2):
                scales[h] = read[h]
                if nested:
                    scales[h] = multiply(bits_float(shared[place_of(coded[h])]), read[h]) + smallest
            scale_at = int32(scale_at + w_on)
            read_scales(2, absmax, codes, group_absmax, nested, scale_row, scale_at, k_32, shift, shift_2, read, coded)
            for block in range(BLOCKS):
                if int32(column_32 + 2 * block) < k_32:
                    if tile < tiles:
                        look_up(shared, int32(a_at + use + 32 * block), selector, lane_bytes, words, a)
                    b_at = int32(start + use + block * SWIZZLE * eights)
                    multiply_by_warpgroup(x, shared, products, a, b_at, eights)
                    low = from_lane(scales[0], int32((lane & 28) + block))
                    high = from_lane(scales[1], int32((lane & 28) + block))
                    for s in range(sum_count):
                        sums[s] += products[s] * (low if s % 4 < 2 else high)
            column_32 = int32(column_32 + w_on)
            use = int32(use + stage_bytes) if use < last_stage else int32(0)
        copies_done(0)
        cuda.syncthreads()
        pitch = int32(16 * tiles + 4)
        if tile < tiles:
            put_down(shared, sums, 0, eights, along_at, 0, x_rows, pitch, int32(16 * tile + g), t)
        cuda.syncthreads()
        add_up(shared, along, x_rows, pitch, thread, threads, row_0, row_count, n, bias, has_bias, y)

    return v6
