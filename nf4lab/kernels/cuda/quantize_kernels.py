"""Numbers to 4-bit codes and one absmax a block, in one pass over the data.

s = x * (1 / absmax); a value's position is the number of boundaries strictly below s; its code is the position's
nibble in `numbering` (0xFEDCBA9876543210 counts upwards, as NF4 does; FP4 numbers sign and magnitude).

v1  one thread, one block of values: the kernel that teaches
v2  one thread, eight values by 16-byte loads; the threads of a block share their absmax by shuffles
v3  the code from a table of 64 cells, made beforehand: one lookup and one comparison instead of 15 comparisons
v4  two such groups a thread, both loads under way before the table is needed
v5  one thread, 64 bytes of x: what a thread does once is shared by 16 or 32 values; the table of cells cut in two, so
    that of its 33 cells only the outermost two meet in a bank of shared memory; three instructions to add a code: the
    one in use

Every version takes (x, boundaries, cells, packed, absmax, flag, n, block_shift, numbering, check, wide), with
block_size = 2**block_shift; v1 and v2 leave `cells` alone, v3 to v5 `boundaries` and `numbering`. A NaN or infinity
sets flag[0] if `check`. Groups of eight elements numbered below `wide` are aligned for 16-byte loads and 4-byte
stores; the others go element by element.
"""

import functools
import math

import numpy as np
from numba import config, cuda, float32, int32, int64, uint8, uint32, uint64

from .intrinsics import (
    bits_float,
    element_bits,
    float_bits,
    in_16_bytes,
    load,
    load8,
    load16,
    max_across,
    max_magnitude,
    max_magnitude8,
    max_magnitude_64_bytes,
    next_code,
    quotient,
    reciprocal,
    store4,
    store_codes,
    widen,
    widen8,
)

THREADS = 32 if config.ENABLE_CUDASIM else 256  # the simulator starts a thread of the host for each
INFINITY_BITS = 0x7F800000  # |x| as bits orders like |x|, and NaN is above infinity: one maximum finds both
CELLS = 64  # 33 of them over [-1, 1], 1/16 wide: NF4's boundaries are 0.08 apart, so none holds two
ALIGN = 1.5 * 2**23  # added to a float32, it leaves the nearest integer in the lowest bits


def cell_table(boundaries, codes):
    """What a quantizer must know of each cell, uint64 (64,): the one boundary in it, and the code below that.

    boundaries: 15 ascending float32 (+inf where there are fewer). codes: 16, in the order of the levels. The low half
    of an entry holds the boundary's bits (+inf where there is none), the high half the code. cell_of never decreases,
    so boundaries of earlier cells lie below every s of this one and those of later cells do not. Returns None where
    that is not enough: two boundaries share a cell, or the code above one is not the code below it plus 1.
    """
    boundaries = np.asarray(boundaries, np.float32)
    inside = np.clip(boundaries, np.float32(-1.125), np.float32(1.125))  # beyond the ends: cells that no s reaches
    home = (np.float32(64) * inside + np.float32(ALIGN)).view(np.int32).astype(np.int64) - 0x4B400000 >> 2
    table = np.zeros(CELLS, np.uint64)
    for cell in range(-16, 17):
        below, here = int((home < cell).sum()), boundaries[home == cell]
        if len(here) > 1 or (len(here) and codes[below + 1] != codes[below] + 1):
            return None
        bound = here if len(here) else np.full(1, np.inf, np.float32)
        table[cell % CELLS] = codes[below] << 32 | int(bound.view(np.uint32)[0])
    return table


@cuda.jit
def v1(x, boundaries, cells, packed, absmax, flag, n, block_shift, numbering, check, wide):
    block = int64(cuda.grid(1))
    start = block << block_shift
    end = min(start + (int64(1) << block_shift), n)
    if start < n:
        bits = uint32(0)
        for i in range(start, end):
            bits = max_magnitude(bits, load(x, i))
        if check and bits >= uint32(INFINITY_BITS):
            flag[0] = 1
        scale = bits_float(bits)
        absmax[block] = scale
        inverse = reciprocal(scale) if scale > float32(0) else float32(0)
        for i in range(start, end, 2):
            byte = 0
            for k in range(2):
                value = load(x, i + k) if i + k < n else float32(0)
                s = value * inverse if inverse < float32(math.inf) else quotient(value, scale)
                position = 0
                for b in range(15):
                    if s > boundaries[b]:
                        position += 1
                byte = (byte << 4) | ((numbering >> (4 * position)) & 15)
            packed[i >> 1] = uint8(byte)


@cuda.jit(device=True, inline="always")
def start_reading(x, i, wide, raw):
    """Set the loads of group i under way; nothing waits for them yet."""
    if i < wide:
        load8(x, i, raw)


@cuda.jit(device=True, inline="always")
def finish_reading(x, i, n, wide, raw, values):
    """Write elements 8i..8i+7 as float32; return the bits of the greatest magnitude.

    Elements past the end are 0, which changes no absmax and pads an odd n.
    """
    bits = uint32(0)
    if i < wide:
        bits = max_magnitude8(x, raw)
        widen8(x, raw, values)
    else:
        for k in range(8):
            values[k] = load(x, 8 * i + k) if 8 * i + k < n else float32(0)
            bits = max_magnitude(bits, values[k])
    return bits


@cuda.jit(device=True, inline="always")
def block_absmax_bits(bits, lanes, scratch):
    """The greatest `bits` of `lanes` neighbouring threads, which hold one block."""
    bits = max_across(bits, min(lanes, 32))
    if lanes > 32:  # a block over several warps: they meet in shared memory
        warp = cuda.threadIdx.x >> 5
        if cuda.threadIdx.x & 31 == 0:
            scratch[warp] = bits
        cuda.syncthreads()
        first = warp & ~((lanes >> 5) - 1)
        for k in range(lanes >> 5):
            bits = max(bits, scratch[first + k])
        cuda.syncthreads()
    return bits


@cuda.jit(device=True, inline="always")
def normalise(values, scale):
    """values[k] := values[k] * (1 / scale); zeros for a block of zeros; a true division where 1 / scale overflows."""
    inverse = reciprocal(scale) if scale > float32(0) else float32(0)
    if inverse == float32(math.inf):
        for k in range(8):
            values[k] = quotient(values[k], scale)
    else:
        for k in range(8):
            values[k] = values[k] * inverse


@cuda.jit(device=True, inline="always")
def code_by_comparing(s, thresholds, numbering):
    position = 0
    for b in range(15):
        if s > thresholds[b]:
            position += 1
    return uint32((numbering >> (4 * position)) & 15)


@cuda.jit(device=True, inline="always")
def fill(table, cells):
    for c in range(cuda.threadIdx.x, CELLS, cuda.blockDim.x):
        table[c] = cells[c]
    cuda.syncthreads()


@cuda.jit(device=True, inline="always")
def place(code, k):
    """A code where element k of a group has it: the even element of each byte in the high nibble."""
    return uint32(code << uint32(4 * (k ^ 1)))


@cuda.jit(device=True, inline="always")
def write_group(packed, i, n, wide, word):
    if i < wide:
        store4(packed, i, word)
    else:
        for k in range(4):
            if 8 * i + 2 * k < n:
                packed[4 * i + k] = uint8((word >> uint32(8 * k)) & uint32(255))


@cuda.jit(device=True, inline="always")
def write_absmax(absmax, flag, i, n, block_shift, lanes, bits, check):
    """The first thread of a block stores its absmax, and raises the flag if that is infinite or NaN."""
    if cuda.threadIdx.x & (lanes - 1) == 0 and 8 * i < n:
        absmax[(8 * i) >> block_shift] = bits_float(bits)
        if check and bits >= uint32(INFINITY_BITS):
            flag[0] = 1


@cuda.jit
def v2(x, boundaries, cells, packed, absmax, flag, n, block_shift, numbering, check, wide):
    thresholds = cuda.shared.array(15, float32)
    scratch = cuda.shared.array(16, uint32)
    raw = cuda.local.array(8, uint32)
    values = cuda.local.array(8, float32)
    if cuda.threadIdx.x < 15:
        thresholds[cuda.threadIdx.x] = boundaries[cuda.threadIdx.x]
    cuda.syncthreads()
    i = int64(cuda.grid(1))
    lanes = int32(1 << (block_shift - 3))
    start_reading(x, i, wide, raw)
    bits = finish_reading(x, i, n, wide, raw, values)
    bits = block_absmax_bits(bits, lanes, scratch)
    write_absmax(absmax, flag, i, n, block_shift, lanes, bits, check)
    normalise(values, bits_float(bits))
    word = uint32(0)
    for k in range(8):
        word = uint32(word | place(code_by_comparing(values[k], thresholds, numbering), k))
    write_group(packed, i, n, wide, word)


@cuda.jit(device=True, inline="always")
def cell_of(s):
    """round(64 s) // 4, modulo 64: 48..63 below zero, 0..16 above."""
    return (float_bits(s * float32(64) + float32(ALIGN)) >> uint32(2)) & uint32(CELLS - 1)


@cuda.jit(device=True, inline="always")
def codes_of_group(values, table):
    """Eight codes in one uint32."""
    word = uint32(0)
    for k in range(8):  # from the highest nibble down: elements 6, 7, 4, 5, 2, 3, 0, 1
        s = values[k ^ 6]
        cell = table[cell_of(s)]
        word = uint32(uint32(word << uint32(4)) + uint32(cell >> uint64(32)))
        word = uint32(word + uint32(1)) if s > bits_float(uint32(cell & uint64(0xFFFFFFFF))) else word
    return word


@cuda.jit
def v3(x, boundaries, cells, packed, absmax, flag, n, block_shift, numbering, check, wide):
    table = cuda.shared.array(CELLS, uint64)
    scratch = cuda.shared.array(16, uint32)
    raw = cuda.local.array(8, uint32)
    values = cuda.local.array(8, float32)
    i = int64(cuda.grid(1))
    lanes = int32(1 << (block_shift - 3))
    start_reading(x, i, wide, raw)
    fill(table, cells)
    bits = finish_reading(x, i, n, wide, raw, values)
    bits = block_absmax_bits(bits, lanes, scratch)
    write_absmax(absmax, flag, i, n, block_shift, lanes, bits, check)
    normalise(values, bits_float(bits))
    write_group(packed, i, n, wide, codes_of_group(values, table))


@cuda.jit
def v4(x, boundaries, cells, packed, absmax, flag, n, block_shift, numbering, check, wide):
    table = cuda.shared.array(CELLS, uint64)
    scratch = cuda.shared.array(16, uint32)
    raw_i = cuda.local.array(8, uint32)
    raw_j = cuda.local.array(8, uint32)
    values = cuda.local.array(8, float32)
    i = int64(cuda.blockIdx.x) * (2 * cuda.blockDim.x) + cuda.threadIdx.x
    j = i + cuda.blockDim.x
    lanes = int32(1 << (block_shift - 3))
    start_reading(x, i, wide, raw_i)
    start_reading(x, j, wide, raw_j)
    fill(table, cells)
    bits = finish_reading(x, i, n, wide, raw_i, values)
    bits = block_absmax_bits(bits, lanes, scratch)
    write_absmax(absmax, flag, i, n, block_shift, lanes, bits, check)
    normalise(values, bits_float(bits))
    write_group(packed, i, n, wide, codes_of_group(values, table))
    bits = finish_reading(x, j, n, wide, raw_j, values)
    bits = block_absmax_bits(bits, lanes, scratch)
    write_absmax(absmax, flag, j, n, block_shift, lanes, bits, check)
    normalise(values, bits_float(bits))
    write_group(packed, j, n, wide, codes_of_group(values, table))


@cuda.jit(device=True, inline="always")
def gather(x, first, n, count, raw):
    """What load16 would have read of elements first..first + count - 1, one by one; zeros past the end."""
    words, bits = 16, 32 * 16 // count
    for w in range(words):
        raw[w] = uint32(0)
    for e in range(count):
        if first + e < n:
            w = e * bits >> 5
            raw[w] = uint32(raw[w] | uint32(uint32(element_bits(x, first + e)) << uint32(e * bits & 31)))


@cuda.jit(device=True, inline="always")
def codes_of_eight(x, raw, first, factor, divide, bounds, below):
    """The codes of elements first..first + 7 in one uint32: below[cell], and 1 more above the boundary in the cell."""
    word = uint32(0)
    for k in range(8):  # from the highest nibble down: elements 6, 7, 4, 5, 2, 3, 0, 1
        value = widen(x, raw, first + (k ^ 6))
        s = quotient(value, factor) if divide else value * factor
        cell = cell_of(s)
        word = next_code(word, below[cell], s, bounds[cell])
    return word


@cuda.jit
def v5(x, boundaries, cells, packed, absmax, flag, n, block_shift, numbering, check, wide):
    bounds = cuda.shared.array(CELLS, float32)  # cells -16..15 lie in 32 different banks
    below = cuda.shared.array(CELLS, uint32)
    scratch = cuda.shared.array(16, uint32)
    raw = cuda.local.array(16, uint32)
    words = cuda.local.array(4, uint32)
    count = 4 * in_16_bytes(x)
    thread = int64(cuda.grid(1))
    first = thread * count
    whole = first + count <= 8 * wide
    if whole:
        for q in range(4):
            load16(x, 4 * thread + q, raw, 4 * q)
    else:
        gather(x, first, n, count, raw)
    for start in range(0, CELLS, THREADS):
        c = start + cuda.threadIdx.x
        if c < CELLS:
            cell = uint64(cells[c])
            bounds[c] = bits_float(uint32(cell & uint64(0xFFFFFFFF)))
            below[c] = uint32(cell >> uint64(32))
    cuda.syncthreads()
    lanes = int32((1 << block_shift) // count)  # neighbouring threads that share a block
    bits = block_absmax_bits(max_magnitude_64_bytes(x, raw), lanes, scratch)
    scale = bits_float(bits)
    if cuda.threadIdx.x & (lanes - 1) == 0 and first < n:
        absmax[first >> block_shift] = scale
        if check and bits >= uint32(INFINITY_BITS):
            flag[0] = 1
    inverse = reciprocal(scale) if scale > float32(0) else float32(0)
    if inverse < float32(math.inf):
        for w in range(count >> 3):
            words[w] = codes_of_eight(x, raw, 8 * w, inverse, False, bounds, below)
    else:
        for w in range(count >> 3):
            words[w] = codes_of_eight(x, raw, 8 * w, scale, True, bounds, below)
    if whole:
        store_codes(packed, thread, x, words)
    else:
        for b in range(count >> 1):
            if first + 2 * b < n:
                packed[(first >> 1) + b] = uint8(words[b >> 2] >> uint32(8 * (b & 3)) & uint32(255))


VERSIONS = {"v1": v1, "v2": v2, "v3": v3, "v4": v4, "v5": v5}


@functools.lru_cache(maxsize=1024)
def shape(version, n, block_size, x_bytes):
    """(blocks, threads a block) that cover n elements: a quantization block never crosses a thread block."""
    elements = {"v1": block_size, "v4": 16, "v5": 64 // x_bytes}.get(version, 8)  # a thread's share
    threads = THREADS if version == "v1" else max(THREADS, block_size // (8 if version == "v4" else elements))
    return -(-n // (threads * elements)), threads
