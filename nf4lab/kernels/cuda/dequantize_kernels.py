"""NF4 codes back to numbers on the GPU: value = levels[code] * absmax[block], rounded once to the output's dtype.

v1      one thread, one byte: the kernel that teaches
v2      the 16 levels in shared memory: no two codes of a warp wait for each other
v3      one thread, four bytes: its eight values leave in one 16-byte store
v4      two such groups a thread, both loads under way before the table is needed: the one in use
nested  v4 with the absmax decoded on the way, from 8-bit codes: one launch, 1 byte a block instead of 4

v1 to v4 take (packed, absmax, levels, out, n, block_shift, wide) with block_size = 2**block_shift. Groups of eight
elements numbered below `wide` are aligned for 4-byte loads and 16-byte stores; the others go element by element.
"""

from numba import cuda, float32, int64, uint32

from .intrinsics import load4, multiply, store, store8

THREADS = 256


@cuda.jit
def v1(packed, absmax, levels, out, n, block_shift, wide):
    i = int64(cuda.grid(1))
    if 2 * i < n:
        byte = packed[i]
        scale = absmax[(2 * i) >> block_shift]  # both elements of a byte share a block: block_size is even
        store(out, 2 * i, levels[byte >> 4] * scale)
        if 2 * i + 1 < n:
            store(out, 2 * i + 1, levels[byte & 15] * scale)


@cuda.jit
def v2(packed, absmax, levels, out, n, block_shift, wide):
    table = cuda.shared.array(16, float32)
    if cuda.threadIdx.x < 16:
        table[cuda.threadIdx.x] = levels[cuda.threadIdx.x]
    cuda.syncthreads()
    i = int64(cuda.grid(1))
    if 2 * i < n:
        byte = packed[i]
        scale = absmax[(2 * i) >> block_shift]
        store(out, 2 * i, table[byte >> 4] * scale)
        if 2 * i + 1 < n:
            store(out, 2 * i + 1, table[byte & 15] * scale)


@cuda.jit(device=True, inline="always")
def read_group(packed, i, n, wide):
    """The four bytes of group i as one uint32; bytes past the end are 0."""
    word = uint32(0)
    if i < wide:
        word = load4(packed, i)
    else:
        for k in range(4):
            if 8 * i + 2 * k < n:
                word = uint32(word | uint32(uint32(packed[4 * i + k]) << uint32(8 * k)))
    return word


@cuda.jit(device=True, inline="always")
def write_group(out, i, n, wide, word, scale, table):
    """Elements 8i..8i+7, whose codes are the four bytes of `word`."""
    values = cuda.local.array(8, float32)  # registers: once unrolled, every index is a constant
    for k in range(4):
        byte = uint32(word >> uint32(8 * k))
        values[2 * k] = table[(byte >> uint32(4)) & uint32(15)] * scale
        values[2 * k + 1] = table[byte & uint32(15)] * scale
    if i < wide:
        store8(out, i, values)
    else:
        for k in range(8):
            if 8 * i + k < n:
                store(out, 8 * i + k, values[k])


@cuda.jit
def v3(packed, absmax, levels, out, n, block_shift, wide):
    table = cuda.shared.array(16, float32)
    if cuda.threadIdx.x < 16:
        table[cuda.threadIdx.x] = levels[cuda.threadIdx.x]
    cuda.syncthreads()
    i = int64(cuda.grid(1))
    if 8 * i < n:
        word = read_group(packed, i, n, wide)
        write_group(out, i, n, wide, word, absmax[(8 * i) >> block_shift], table)


@cuda.jit
def v4(packed, absmax, levels, out, n, block_shift, wide):
    table = cuda.shared.array(16, float32)
    i = int64(cuda.blockIdx.x) * (2 * cuda.blockDim.x) + cuda.threadIdx.x
    j = i + cuda.blockDim.x
    word_i = word_j = uint32(0)
    scale_i = scale_j = float32(0)
    if 8 * i < n:
        word_i, scale_i = read_group(packed, i, n, wide), absmax[(8 * i) >> block_shift]
    if 8 * j < n:
        word_j, scale_j = read_group(packed, j, n, wide), absmax[(8 * j) >> block_shift]
    if cuda.threadIdx.x < 16:
        table[cuda.threadIdx.x] = levels[cuda.threadIdx.x]
    cuda.syncthreads()
    if 8 * i < n:
        write_group(out, i, n, wide, word_i, scale_i, table)
    if 8 * j < n:
        write_group(out, j, n, wide, word_j, scale_j, table)


@cuda.jit(device=True, inline="always")
def decode(block, codes, group_absmax, offset, code_map, group_shift):
    """A block's absmax from its 8-bit code: a product, then a sum, each rounded (as torch and bitsandbytes do)."""
    return multiply(code_map[codes[block]], group_absmax[block >> group_shift]) + offset[0]


@cuda.jit
def nested(packed, codes, group_absmax, offset, code_map, levels, out, n, block_shift, group_shift, wide):
    table = cuda.shared.array(16, float32)
    i = int64(cuda.blockIdx.x) * (2 * cuda.blockDim.x) + cuda.threadIdx.x
    j = i + cuda.blockDim.x
    word_i = word_j = uint32(0)
    scale_i = scale_j = float32(0)
    if 8 * i < n:
        word_i = read_group(packed, i, n, wide)
        scale_i = decode((8 * i) >> block_shift, codes, group_absmax, offset, code_map, group_shift)
    if 8 * j < n:
        word_j = read_group(packed, j, n, wide)
        scale_j = decode((8 * j) >> block_shift, codes, group_absmax, offset, code_map, group_shift)
    if cuda.threadIdx.x < 16:
        table[cuda.threadIdx.x] = levels[cuda.threadIdx.x]
    cuda.syncthreads()
    if 8 * i < n:
        write_group(out, i, n, wide, word_i, scale_i, table)
    if 8 * j < n:
        write_group(out, j, n, wide, word_j, scale_j, table)


VERSIONS = {"v1": v1, "v2": v2, "v3": v3, "v4": v4}


def grid(version, n):
    """Blocks of THREADS threads that cover n elements."""
    elements = 2 if version in ("v1", "v2") else 8 if version == "v3" else 16  # a thread's share
    return -(-n // (THREADS * elements))
