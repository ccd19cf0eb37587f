"""The fast Walsh-Hadamard transform on the GPU, with signs before or after it, a factor, and one rounding: one pass.

v1  a thread block, one piece: every stage in shared memory, a barrier after each
v2  a thread, eight values: three stages at a time in its registers, and shared memory only to change hands in between

Each reads a piece once and writes it once, and makes its sums in the order of `kernels.hadamard.by_halves`: the bits
are the same. Shared memory is read and written once a stage in v1, once every three stages in v2; for a row of 4096
that is 12 times against 3.

Both take (x, signs, out, n, width, columns, signed, factor). Pieces of `width` values, a power of two, lie one after
another in x (n,) and out (n,), which may be one tensor; signs (columns,) of a row of `columns` are multiplied in before
(signed = 1), after (2) or not at all (0). factor: the bits of a float32.
"""

import functools

import numpy as np
from numba import config, cuda, float32, int32, int64, uint32

from nf4lab.kernels.cuda.intrinsics import bits_float, load, load8, store, widen8
from nf4lab.kernels.cuda.launch import launch

WIDEST = 8192  # float32 in the 32 KB of shared memory that a block gets without asking
THREADS = 32 if config.ENABLE_CUDASIM else 256
UNSIGNED, BEFORE, AFTER = 0, 1, 2


@cuda.jit
def v1(x, signs, out, n, width, columns, signed, factor):
    values = cuda.shared.array(WIDEST, float32)
    first = int64(cuda.blockIdx.x) * width
    side, pairs = int32(width), int32(width >> 1)
    thread, threads = int32(cuda.threadIdx.x), int32(cuda.blockDim.x)
    for i in range(thread, side, threads):
        value = load(x, first + i)
        values[i] = value * load(signs, (first + i) % columns) if signed == BEFORE else value
    cuda.syncthreads()
    apart = int32(1)
    while apart < side:
        for pair in range(thread, pairs, threads):
            low = int32(((pair & ~(apart - 1)) << 1) + (pair & (apart - 1)))
            a, b = values[low], values[low + apart]
            values[low], values[low + apart] = a + b, a - b
        cuda.syncthreads()
        apart = int32(apart << 1)
    for i in range(thread, side, threads):
        value = values[i] * bits_float(uint32(factor))
        store(out, first + i, value * load(signs, (first + i) % columns) if signed == AFTER else value)


@cuda.jit(device=True, inline="always")
def bank_free(i):
    """Where value i lies in shared memory, so that the 32 threads of a warp find theirs in 32 banks.

    They ask for values 8 apart at first, then for runs of 8 that lie 64 apart, then for neighbours. A bank is the
    lowest 5 bits of an address: bits 5 to 7 of i, which tell apart threads that would meet, are mixed into them.
    """
    return int32(i ^ ((i >> int32(5)) & int32(7)) ^ (((i >> int32(6)) & int32(3)) << int32(3)))


@cuda.jit(device=True, inline="always")
def stage(values, apart):
    """a, b -> a + b, a - b for the pairs of eight registers that lie `apart` apart."""
    for k in range(8):
        if k & apart == 0:
            a, b = values[k], values[k + apart]
            values[k], values[k + apart] = a + b, a - b


@cuda.jit
def v2(x, signs, out, n, width, columns, signed, factor):
    shared = cuda.shared.array(WIDEST, float32)
    raw = cuda.local.array(8, uint32)
    values = cuda.local.array(8, float32)
    thread, eighth, side = int32(cuda.threadIdx.x), int32(width >> 3), int32(width)
    lane = int32(thread & (eighth - 1))  # of those that share the piece
    here = int32((thread - lane) << 3)  # where it begins in shared memory
    group = int64(cuda.blockIdx.x) * cuda.blockDim.x + thread
    first = (group - lane) << 3  # where it begins in x
    inside = group << 3 < n
    for k in range(8):
        values[k] = float32(0)
    if inside:
        load8(x, group, raw)
        widen8(x, raw, values)
        if signed == BEFORE:
            column = (group << 3) % columns
            for k in range(8):
                values[k] = values[k] * load(signs, column + k)
    stage(values, 1)
    stage(values, 2)
    stage(values, 4)
    done, apart, base = int32(8), int32(1), int32(lane << 3)
    while done < side:
        for k in range(8):
            shared[bank_free(int32(here + base + k * apart))] = values[k]
        cuda.syncthreads()
        apart = int32(min(done, eighth))
        base = int32(((lane & ~(apart - 1)) << 3) + (lane & (apart - 1)))
        for k in range(8):
            values[k] = shared[bank_free(int32(here + base + k * apart))]
        if apart >= done:  # else the last few stages: of eight values so far apart, some are through the first ones
            stage(values, 1)
        if 2 * apart >= done:
            stage(values, 2)
        stage(values, 4)
        done = int32(done << 3)
    if inside:
        column = first % columns
        for k in range(8):
            i = int32(base + k * apart)
            value = values[k] * bits_float(uint32(factor))
            store(out, first + i, value * load(signs, column + i) if signed == AFTER else value)


VERSIONS = {"v1": v1, "v2": v2}


def transform(x, out, width, *, signs=None, after=False, factor=1.0, version=None):
    """Pieces of `width` of x (…, columns) times Sylvester's matrix, times factor, rounded into out of x's shape.

    Contiguous float32, float16 or bfloat16 tensors of one GPU; width a power of two up to WIDEST that divides the
    columns. signs: (columns,), multiplied into x, or into out where `after`. version: by default v2 where it serves
    the width and x lies on 16 bytes. Nothing is checked.
    """
    n = x.numel()
    if not n:
        return
    whole = width >= 8 and x.data_ptr() % 16 == 0
    version = version or ("v2" if whole else "v1")
    signed = UNSIGNED if signs is None else AFTER if after else BEFORE
    signs = x if signs is None else signs
    threads = THREADS if version == "v1" else max(THREADS, width // 8)
    grid = n // width if version == "v1" else -(-n // (8 * threads))
    args = x, signs, out, n, width, x.shape[-1], signed, bits_of(factor)
    dtypes = x.dtype, signs.dtype, out.dtype
    launch(VERSIONS[version], grid, threads, args, dtype=dtypes, max_registers=64)  # 1024 threads have no more


@functools.lru_cache(maxsize=64)
def bits_of(factor):
    return int(np.float32(factor).view(np.uint32))
