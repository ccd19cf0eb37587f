"""y = x W^T + bias for 1 to 128 rows of x and a packed 4-bit weight W (n, k): v6, in use on sm_90 above few rows.

Hopper's tensor cores take their steps from four warps at once, a warpgroup: A (64 rows of W, 16 columns) from its
registers, B (16 columns, all rows of x) straight from shared memory. So nobody reads x into registers, a step covers
up to 128 rows of x, and while one warpgroup's products are on their way the others look levels up.

            columns of W: 2 or 4 blocks of 64 a step     one warpgroup: 4 tiles of 16 rows, a tile a warp
            warpgroups 0, 1   warpgroups 2, 3 …
    tiles   ┌───────────────┬───────────────┬──         A   lane (g, t): rows g and g + 8 of its warp's tile;
    0 … 3   │ warpgroup 0   │ warpgroup 2   │               of 16 columns 2t, 2t + 1 and 2t + 8, 2t + 9
    4 … 7   │ warpgroup 1   │ warpgroup 3   │           B   row n: 64 columns are 128 bytes; piece p of 16 bytes
            └───────────────┴───────────────┴──             lies at place p ^ (n & 7): no bank is met twice

The columns must keep their order here, for B is read as it was copied. So lane (g, t) gets whole words of codes, eight
columns each, as its three neighbours do, and takes byte t of each. The warpgroups of the same columns share two stages,
one that is multiplied and one that is filled, and wait for each other only. All take as many steps: past the last
column x is zeros. Tables, absmax and the sum at the end are those of `gemm_kernels`.
"""

import functools
from typing import NamedTuple

from numba import config, cuda, float32, int32, uint32

from .gemm_kernels import TABLES, add_up, fill_tables, place_of, put_down, read_scales, read_tables
from .intrinsics import (
    bits_float,
    copies_done,
    copies_go,
    copies_seen,
    copy16_or_zeros,
    from_lane,
    kernel_before_done,
    load16_shared,
    multiply,
    next_kernel_may_start,
    pair_selected,
    pinned,
    products_there,
    shared_start,
    start_products,
    sync_threads,
)

MOST_ROWS = 128
WARPGROUP = 128  # threads
STAGES = 2
SWIZZLE = 1024  # bytes: where the pattern of B's pieces begins anew


class Layout(NamedTuple):
    """How a thread block is cut: warpgroups over tiles and over columns, tiles, eights of x's rows.

    And how many blocks of 64 columns make a step: 2 or 4.
    """

    down: int
    along: int
    tiles: int
    eights: int
    blocks: int

    @property
    def threads(self):
        return WARPGROUP * self.down * self.along

    @property
    def x_bytes(self):
        """Bytes of x in a stage."""
        return self.blocks * SWIZZLE * self.eights

    @property
    def w_pitch(self):
        """Bytes from row to row of the codes in a stage."""
        return 32 * self.blocks

    @property
    def stage_bytes(self):
        return -(-(self.x_bytes + 16 * self.tiles * self.w_pitch) // SWIZZLE) * SWIZZLE

    def shared_bytes(self, rows):
        sums = 4 * self.along * rows * (16 * self.tiles + 4)
        return 4 * TABLES + max(self.along * STAGES * self.stage_bytes, sums)


def layouts(eights, tiles):
    """Ways to cut a block of so many tiles, and eights of x's rows: the fastest first. One fits a Hopper."""
    if tiles > 8:
        return []
    down = 2 if tiles > 4 else 1
    along = 1 if config.ENABLE_CUDASIM else (4 if eights <= 8 else 2) // down  # more rows need more registers
    return [Layout(down, along, tiles, eights, blocks) for blocks in (4, 2)]


@functools.cache
def kernel(layout):
    """v6 for one Layout."""
    down, along, tiles, eights, blocks = layout
    threads, x_bytes, w_pitch, stage_bytes = layout.threads, layout.x_bytes, layout.w_pitch, layout.stage_bytes
    together = WARPGROUP * down  # threads that share columns
    w_vectors, x_vectors = 2 * blocks, 8 * blocks  # 16 bytes each: in a step's row of codes, of x
    w_at_once, x_at_once = together // w_vectors, together // x_vectors  # rows
    most_w, most_x = -(-16 * tiles // w_at_once), -(-8 * eights // x_at_once)
    sum_count = 4 * eights
    bytes_a_thread = max(1, 256 // threads)
    w_on, x_on = w_vectors * along, x_vectors * along  # from a step to the next of the same warpgroups
    rows_a_line = 4 // blocks  # of the codes, in 128 bytes of shared memory

    @cuda.jit(device=True, inline="always")
    def place_in_row(piece, row):
        """Where a stage has 16 bytes of a row's codes: so that eight rows' lie in different banks."""
        return int32(16 * (piece ^ ((row // rows_a_line) & (w_vectors - 1))))

    @cuda.jit(device=True, inline="always")
    def copy_rows(shared, to, pitch, data, sources, ahead, there, row, rows, most, at_once):
        """Set under way: 16 bytes of every at_once-th row, from `row` on, of as many as a stage has, or zeros."""
        for j in range(most):
            if rows % at_once == 0 or j < most - 1 or int32(row + j * at_once) < rows:
                place = int32((to ^ (16 * (j * at_once & 7))) + j * at_once * pitch)
                copy16_or_zeros(shared, place, data, int32(sources[j] + ahead), there)

    @cuda.jit(device=True, inline="always")
    def copy_step(shared, w_to, packed, w_from, w_ahead, w_row, k_32, x_to, x, x_from, x_ahead, x_row, k_8):
        """Set under way: this thread's share of the codes and of x that a step needs; zeros past the last column."""
        copy_rows(shared, w_to, w_pitch, packed, w_from, w_ahead, w_ahead < k_32, w_row, 16 * tiles, most_w, w_at_once)
        copy_rows(shared, x_to, 128, x, x_from, x_ahead, x_ahead < k_8, x_row, 8 * eights, most_x, x_at_once)
        copies_go()

    @cuda.jit(device=True, inline="always")
    def look_up(shared, at, places, block, selector, lane_bytes, words, a):
        """A in the type of x: this lane's levels in a block's 64 columns of two rows, g's from `at` on."""
        for piece in range(2):
            for h in range(2):
                place = int32(at + 8 * h * w_pitch + (places ^ (32 * block + 16 * piece)))
                load16_shared(shared, place, words, 4 * h)
            for step in range(2):
                for e in range(4):  # rows g, g + 8; then the same rows, eight columns on
                    word = words[4 * (e & 1) + 2 * step + (e >> 1)]
                    a[8 * piece + 4 * step + e] = pair_selected(shared, word, selector, lane_bytes)

    @cuda.jit(device=True, inline="always")
    def multiply_block(
        x, shared, block, there, at, places, b_at, selector, lane_bytes, words, a, products, scales, lane, sums
    ):
        """sums += this warpgroup's rows of W times the rows of x, over one block of a step's columns."""
        if there:
            look_up(shared, at, places, block, selector, lane_bytes, words, a)
        start_products(x, shared, products, a, int32(b_at + block * SWIZZLE * eights), eights)
        low = from_lane(scales[0], int32((lane & 28) + block))
        high = from_lane(scales[1], int32((lane & 28) + block))
        products_there(products, eights)
        for s in range(sum_count):
            sums[s] += products[s] * (low if s % 4 < 2 else high)

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
        x_from = cuda.local.array(most_x, int32)
        scale_row = cuda.local.array(2, int32)
        scales = cuda.local.array(2, float32)  # of rows g and g + 8 in a step's block t, or t & 1 of two
        read = cuda.local.array(2, float32)  # the next step's, as they are stored
        coded = cuda.local.array(2, uint32)
        pairs = cuda.local.array(bytes_a_thread, uint32)
        decoded = cuda.local.array(bytes_a_thread, float32)
        thread = int32(cuda.threadIdx.x)
        lane, warp = int32(thread & 31), int32(thread >> 5)
        g, t = int32(lane >> 2), int32(lane & 3)
        tile, member = int32(warp % (4 * down)), int32(thread % together)
        along_at = from_lane(int32(warp // (4 * down)), 0)  # so that the compiler sees: one for a warp
        lane_bytes, selector = uint32(4 * lane), uint32(0x7604 + 16 * t)
        x_rows, k_8, k_32, last_row = int32(rows), int32(k >> 3), int32(k >> 5), int32(n - 1)
        shift, shift_2 = int32(block_shift - 5), int32(group_shift)
        row_0 = int32(cuda.blockIdx.x * 16 * tiles)
        row_count = min(int32(16 * tiles), int32(last_row + 1 - row_0))
        steps = int32((k_32 + (w_on - 1)) // w_on)
        start = int32(shared_start(shared) + 4 * TABLES + along_at * STAGES * stage_bytes)
        w_row, w_vector = int32(member // w_vectors), int32(member % w_vectors)
        x_row, x_vector = int32(member // x_vectors), int32(member % x_vectors)
        for j in range(most_w):
            w_from[j] = int32(min(int32(row_0 + w_row + j * w_at_once), last_row) * k_32)
        for j in range(most_x):
            x_from[j] = int32(min(int32(x_row + j * x_at_once), int32(x_rows - 1)) * k_8)
        w_to = int32(start + x_bytes + w_row * w_pitch + place_in_row(w_vector, w_row))
        piece = int32((x_vector & 7) ^ (x_row & 7))
        x_to = int32(start + (x_vector >> 3) * (SWIZZLE * eights) + 128 * x_row + 16 * piece)
        w_ahead, x_ahead = int32(w_vectors * along_at + w_vector), int32(x_vectors * along_at + x_vector)
        kernel_before_done()
        next_kernel_may_start()
        read_tables(x, levels, code_map, nested, thread, threads, pairs, decoded)
        smallest = offset[0]
        copy_step(shared, w_to, packed, w_from, w_ahead, w_row, k_32, x_to, x, x_from, x_ahead, x_row, k_8)
        for h in range(2):
            coded[h], read[h] = uint32(0), float32(0)  # of a block past the end
            scale_row[h] = int32(min(int32(row_0 + 16 * tile + 8 * h + g), last_row) * k_32)
        scale_at = int32(w_vectors * along_at + 2 * (t & (blocks - 1)))
        read_scales(2, absmax, codes, group_absmax, nested, scale_row, scale_at, k_32, shift, shift_2, read, coded)
        fill_tables(shared, nested, thread, threads, pairs, decoded)
        for s in range(sum_count):
            sums[s] = float32(0)
        a_at = int32(start + x_bytes + (16 * tile + g) * w_pitch)
        places, there = place_in_row(int32(0), g), tile < tiles
        cuda.syncthreads()
        use, fill = int32(0), int32(stage_bytes)  # the stages, in bytes from the first
        for _ in range(steps):
            copies_done(0)
            copies_seen()
            sync_threads(int32(along_at + 1), together)
            w_ahead, x_ahead = int32(w_ahead + w_on), int32(x_ahead + x_on)
            copy_step(
                shared, int32(w_to + fill), packed, w_from, w_ahead, w_row, k_32,
                int32(x_to + fill), x, x_from, x_ahead, x_row, k_8,
            )  # fmt: skip
            for h in range(2):
                scales[h] = read[h]
                if nested:
                    scales[h] = multiply(bits_float(shared[place_of(coded[h])]), read[h]) + smallest
            scale_at = int32(scale_at + w_on)
            read_scales(2, absmax, codes, group_absmax, nested, scale_row, scale_at, k_32, shift, shift_2, read, coded)
            at, b_at = int32(a_at + use), int32(start + use)
            multiply_block(
                x, shared, 0, there, at, places, b_at, selector, lane_bytes, words, a, products, scales, lane, sums
            )
            multiply_block(
                x, shared, 1, there, at, places, b_at, selector, lane_bytes, words, a, products, scales, lane, sums
            )
            if blocks > 2:
                multiply_block(
                    x, shared, 2, there, at, places, b_at, selector, lane_bytes, words, a, products, scales, lane, sums
                )
                multiply_block(
                    x, shared, 3, there, at, places, b_at, selector, lane_bytes, words, a, products, scales, lane, sums
                )
            use, fill = fill, use
        copies_done(0)
        cuda.syncthreads()
        pitch = int32(16 * tiles + 4)
        if tile < tiles:
            put_down(shared, sums, 0, eights, along_at, 0, x_rows, pitch, int32(16 * tile + g), t)
        cuda.syncthreads()
        add_up(shared, along, x_rows, pitch, thread, threads, row_0, row_count, n, bias, has_bias, y)

    return v6
