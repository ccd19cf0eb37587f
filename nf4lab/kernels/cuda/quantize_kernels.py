"""Numbers to 4-bit codes and one absmax a block, in one pass over the data.

s = x * (1 / absmax); a value's position is the number of boundaries strictly below s; its code is the position's
nibble in `numbering` (0xFEDCBA9876543210 counts upwards, as NF4 does; FP4 numbers sign and magnitude).

v1  one thread, one block of values: the kernel that teaches
v2  one thread, eight values by 16-byte loads; the threads of a block share their absmax by shuffles
v3  the code from a table of 32 cells and one comparison, instead of 15 comparisons
v4  two such groups a thread, both loads under way before the table is needed: the one in use

Every version takes (x, boundaries, packed, absmax, flag, n, block_shift, numbering, check, wide), with
block_size = 2**block_shift. A NaN or infinity sets flag[0] if `check`. Groups of eight elements numbered below `wide`
are aligned for 16-byte loads and 4-byte stores; the others go element by element.
"""

import math

from numba import cuda, float32, int32, int64, uint8, uint32

from .intrinsics import bits_float, float_bits, fused, load, load8, max_across, quotient, reciprocal, store4

INFINITY_BITS = 0x7F800000  # |x| as bits orders like |x|, and NaN is above infinity: one maximum finds both
CELLS = 32  # over [-1, 1]: NF4's boundaries are 0.08 apart, a cell is 1/15 wide, so at most one falls into each
CODES_AT = 2 * CELLS


@cuda.jit
def v1(x, boundaries, packed, absmax, flag, n, block_shift, numbering, check, wide):
    block = int64(cuda.grid(1))
    start = block << block_shift
    end = min(start + (int64(1) << block_shift), n)
    if start < n:
        bits = uint32(0)
        for i in range(start, end):
            bits = max(bits, float_bits(load(x, i)) & uint32(0x7FFFFFFF))
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
def read_group(x, i, n, wide, values):
    """Elements 8i..8i+7 as float32; those past the end are 0, which changes no absmax and pads an odd n."""
    if i < wide:
        load8(x, i, values)
    else:
        for k in range(8):
            values[k] = load(x, 8 * i + k) if 8 * i + k < n else float32(0)


@cuda.jit(device=True, inline="always")
def block_absmax_bits(values, lanes, scratch):
    """Bits of the greatest |value| of `lanes` neighbouring threads, which hold one block."""
    bits = uint32(0)
    for k in range(8):
        bits = max(bits, uint32(float_bits(values[k]) & uint32(0x7FFFFFFF)))
    bits = max_across(bits, min(lanes, 32))
    if lanes > 32:  # a block over several warps: they meet in shared memory
        warp = cuda.threadIdx.x >> 5
        if cuda.threadIdx.x & 31 == 0:
            scratch[warp] = bits
        cuda.syncthreads()
        first = warp - warp % (lanes >> 5)
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
def cell_of(s):
    """round(15 s + 16), 1..31 for s in [-1, 1]: adding 2^23 leaves the integer in the lowest bits of the float."""
    return uint32(float_bits(fused(s, float32(15), float32(2**23 + 16))) & uint32(31))


@cuda.jit(device=True, inline="always")
def fill_cells(cell, boundaries, numbering, threshold, code_at):
    """What thread `cell` < 32 knows of its cell; returns how many boundaries fall into it.

    cell_of never decreases, so boundaries in earlier cells are below every s of this one, later ones are not: two
    codes are left, code_at[2 cell] and, above threshold[cell], code_at[2 cell + 1].
    """
    below = 0
    inside = 0
    bound = float32(math.inf)
    for b in range(15):
        boundary = boundaries[b]
        home = 0 if boundary < float32(-1.01) else CELLS if boundary > float32(1.01) else cell_of(boundary)
        if home < cell:
            below += 1
        elif home == cell:
            inside += 1
            bound = boundary
    threshold[cell] = bound
    code_at[2 * cell] = uint8((numbering >> (4 * below)) & 15)
    code_at[2 * cell + 1] = uint8((numbering >> (4 * min(below + 1, 15))) & 15)
    return inside


@cuda.jit(device=True, inline="always")
def code_by_cell(s, threshold, code_at):
    cell = cell_of(s)
    return uint32(code_at[2 * cell + (1 if s > threshold[cell] else 0)])


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
def write_absmax(absmax, flag, i, n, lanes, bits, check):
    """The first thread of a block stores its absmax, and raises the flag if that is no number."""
    if i % lanes == 0 and 8 * i < n:
        absmax[i // lanes] = bits_float(bits)
        if check and bits >= uint32(INFINITY_BITS):
            flag[0] = 1


@cuda.jit
def v2(x, boundaries, packed, absmax, flag, n, block_shift, numbering, check, wide):
    thresholds = cuda.shared.array(15, float32)
    scratch = cuda.shared.array(16, uint32)
    values = cuda.local.array(8, float32)
    if cuda.threadIdx.x < 15:
        thresholds[cuda.threadIdx.x] = boundaries[cuda.threadIdx.x]
    cuda.syncthreads()
    i = int64(cuda.grid(1))
    lanes = 1 << (block_shift - 3)
    read_group(x, i, n, wide, values)
    bits = block_absmax_bits(values, lanes, scratch)
    write_absmax(absmax, flag, i, n, lanes, bits, check)
    normalise(values, bits_float(bits))
    word = uint32(0)
    for k in range(8):
        word = uint32(word | place(code_by_comparing(values[k], thresholds, numbering), k))
    write_group(packed, i, n, wide, word)


@cuda.jit(device=True, inline="always")
def codes_of_group(values, crowded, boundaries, numbering, threshold, code_at):
    """Eight codes in one uint32; a codebook with two boundaries in a cell is searched by comparing."""
    word = uint32(0)
    if crowded:
        for k in range(8):
            word = uint32(word | place(code_by_comparing(values[k], boundaries, numbering), k))
    else:
        for k in range(8):
            word = uint32(word | place(code_by_cell(values[k], threshold, code_at), k))
    return word


@cuda.jit
def v3(x, boundaries, packed, absmax, flag, n, block_shift, numbering, check, wide):
    threshold = cuda.shared.array(CELLS, float32)
    code_at = cuda.shared.array(CODES_AT, uint8)
    scratch = cuda.shared.array(16, uint32)
    values = cuda.local.array(8, float32)
    i = int64(cuda.grid(1))
    lanes = 1 << (block_shift - 3)
    read_group(x, i, n, wide, values)
    inside = 0
    if cuda.threadIdx.x < CELLS:
        inside = fill_cells(cuda.threadIdx.x, boundaries, numbering, threshold, code_at)
    crowded = cuda.syncthreads_or(int32(inside > 1))
    bits = block_absmax_bits(values, lanes, scratch)
    write_absmax(absmax, flag, i, n, lanes, bits, check)
    normalise(values, bits_float(bits))
    word = codes_of_group(values, crowded, boundaries, numbering, threshold, code_at)
    write_group(packed, i, n, wide, word)


@cuda.jit
def v4(x, boundaries, packed, absmax, flag, n, block_shift, numbering, check, wide):
    threshold = cuda.shared.array(CELLS, float32)
    code_at = cuda.shared.array(CODES_AT, uint8)
    scratch = cuda.shared.array(16, uint32)
    values_i = cuda.local.array(8, float32)
    values_j = cuda.local.array(8, float32)
    i = int64(cuda.blockIdx.x) * (2 * cuda.blockDim.x) + cuda.threadIdx.x
    j = i + cuda.blockDim.x
    lanes = 1 << (block_shift - 3)
    read_group(x, i, n, wide, values_i)
    read_group(x, j, n, wide, values_j)
    inside = 0
    if cuda.threadIdx.x < CELLS:
        inside = fill_cells(cuda.threadIdx.x, boundaries, numbering, threshold, code_at)
    crowded = cuda.syncthreads_or(int32(inside > 1))
    bits_i = block_absmax_bits(values_i, lanes, scratch)
    bits_j = block_absmax_bits(values_j, lanes, scratch)
    write_absmax(absmax, flag, i, n, lanes, bits_i, check)
    write_absmax(absmax, flag, j, n, lanes, bits_j, check)
    normalise(values_i, bits_float(bits_i))
    normalise(values_j, bits_float(bits_j))
    word_i = codes_of_group(values_i, crowded, boundaries, numbering, threshold, code_at)
    word_j = codes_of_group(values_j, crowded, boundaries, numbering, threshold, code_at)
    write_group(packed, i, n, wide, word_i)
    write_group(packed, j, n, wide, word_j)


VERSIONS = {"v1": v1, "v2": v2, "v3": v3, "v4": v4}


def shape(version, n, block_size):
    """(blocks, threads a block) that cover n elements: a quantization block never crosses a thread block."""
    threads = 128 if version == "v1" else max(256, block_size // 8)
    elements = block_size if version == "v1" else 16 if version == "v4" else 8  # a thread's share
    return -(-n // (threads * elements)), threads
