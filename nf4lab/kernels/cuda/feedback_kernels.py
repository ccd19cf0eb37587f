"""Error feedback within a block of columns, on the GPU: a warp a row, from left to right.

What is still to be rounded of a row lies in shared memory. All 32 lanes round weight j, alike; then each passes the
error on to the columns that are its own. Arithmetic is that of `backends.feedback`, step by step, nothing fused: the
bits are the same.

Counted for 4096 x 4096 in blocks of 64: 4096 steps, one after the other, of which each waits for a search among 15
boundaries and a division. One by one in torch, each step would be more than twenty launches.
"""

import math

import torch
from numba import config, cuda, float32, int32, int64, uint8, uint32

from nf4lab.kernels.cuda.intrinsics import bits_float, float_bits, multiply, quotient, reciprocal, sync_warp
from nf4lab.kernels.cuda.launch import launch

LEVELS = 16  # at most
TABLES = 3 * LEVELS  # float32 before the rows
WARPS = 1 if config.ENABLE_CUDASIM else 4  # rows of a thread block
BELOW_ZERO = 0x80000001  # the bits of the next float32 below zero, in whose place -0.0 is looked up
MINUS_ZERO = 0x80000000


@cuda.jit(device=True, inline="always")
def rank_of(value, shared, signed_zero):
    """How many of the 15 boundaries that shared begins with lie below value; NaN lies above all."""
    if signed_zero and float_bits(value) == uint32(MINUS_ZERO):
        value = bits_float(uint32(BELOW_ZERO))
    rank = int32(0)
    for k in range(4):
        step = int32(8 >> k)
        if not value <= shared[rank + step - 1]:
            rank = int32(rank + step)
    return rank


@cuda.jit
def encode(
    block, factor, boundaries, ascending, levels, making, reading, codes, errors, rows, width, count, signed_zero
):
    shared = cuda.shared.array(0, float32)  # boundaries, then levels and codes in ascending order, then the rows
    thread, lane = int32(cuda.threadIdx.x), int32(cuda.threadIdx.x & 31)
    if thread < LEVELS:
        shared[thread] = boundaries[thread] if thread < count - 1 else float32(math.inf)
        code = ascending[min(thread, count - 1)]
        shared[LEVELS + thread], shared[2 * LEVELS + thread] = levels[code], float32(code)
    cuda.syncthreads()
    row = int64(cuda.blockIdx.x) * (cuda.blockDim.x >> 5) + (thread >> 5)
    if row < rows:
        left, side, first = int32(TABLES + (thread >> 5) * width), int32(width), row * width
        for k in range(lane, side, 32):
            shared[left + k] = block[first + k]
        sync_warp()
        scale, shift, inverse = making[row], making[rows + row], reciprocal(making[row])
        read_scale, read_shift = reading[row], reading[rows + row]
        for j in range(side):
            value = shared[left + j]
            centred = value - shift
            if inverse < float32(math.inf) and inverse > float32(-math.inf):
                normalized = centred * inverse
            else:
                normalized = quotient(centred, scale)
                if normalized != normalized:  # 0/0 is 0
                    normalized = float32(0)
            rank = rank_of(normalized, shared, signed_zero)
            decoded = multiply(shared[LEVELS + rank], read_scale) + read_shift
            error = quotient(value - decoded, factor[j * width + j])
            if lane == j & 31:
                codes[first + j] = uint8(shared[2 * LEVELS + rank])
                errors[first + j] = error
            for k in range(lane, side, 32):
                if k > j:
                    shared[left + k] -= multiply(factor[j * width + k], error)
            sync_warp()


def encode_block(block, factor, tables, making, reading, signed_zero):
    """(codes uint8, errors over U_jj float32) of block (rows, width), with feedback; all contiguous, on one GPU.

    factor: float32 (width, width), the rows of U. tables: levels, boundaries and codes in order, as a format has them,
    of at most 16 levels. making, reading: float32 (2, rows), scale and location with which codes are made and read.
    """
    rows, width = block.shape
    codes = torch.empty(block.shape, dtype=torch.uint8, device=block.device)
    errors = torch.empty_like(block)
    numbers = rows, width, len(tables.levels), int(signed_zero)
    args = block, factor, tables.boundaries, tables.ascending, tables.levels, making, reading, codes, errors, *numbers
    launch(encode, -(-rows // WARPS), 32 * WARPS, args, dtype=block.dtype, shared_bytes=4 * (TABLES + WARPS * width))
    return codes, errors
