"""NF4 codes back to numbers on the GPU: value = levels[code] * absmax[block], rounded once to the output's dtype.

v1      one thread, one byte: the kernel that teaches
pair    v1 with one store for its two values
eight   v1 with as many weights a thread as fill 16 bytes of output, still a byte a load and a value a store
wide    as many, with one load for their codes and one 16-byte store
v2      v1 with the 16 levels in shared memory: no two codes of a warp wait for each other
v3      wide and v2 together: eight 16-bit values (4 bytes of codes) or four float32 (2 bytes) a thread
v4      two such groups a thread, all loads under way before the table is needed: the one in use
nested  v4 with the absmax decoded on the way, from 8-bit codes: one launch, 1 byte a block instead of 4

All but nested take (packed, absmax, levels, out, n, block_shift, wide) with block_size = 2**block_shift. Groups
numbered below `wide` are whole and aligned for wide loads and stores; the others go element by element.
"""

import functools

from numba import config, cuda, float32, int64, uint8, uint32

from .intrinsics import in_16_bytes, load_codes, multiply, store, store16, store_pair

THREADS = 32 if config.ENABLE_CUDASIM else 256  # the simulator starts a thread of the host for each


@cuda.jit
def v1(packed, absmax, levels, out, n, block_shift, wide):
    i = int64(cuda.grid(1))
    if 2 * i < n:
        byte = packed[i]
        scale = absmax[(2 * i) >> block_shift]  # of both elements: block_size is even
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


@cuda.jit
def pair(packed, absmax, levels, out, n, block_shift, wide):
    i = int64(cuda.grid(1))
    if 2 * i < n:
        byte = packed[i]
        scale = absmax[(2 * i) >> block_shift]
        if wide > 0 and 2 * i + 1 < n:
            store_pair(out, i, levels[byte >> 4] * scale, levels[byte & 15] * scale)
        else:
            store(out, 2 * i, levels[byte >> 4] * scale)
            if 2 * i + 1 < n:
                store(out, 2 * i + 1, levels[byte & 15] * scale)


@cuda.jit
def eight(packed, absmax, levels, out, n, block_shift, wide):
    count = in_16_bytes(out)
    first = int64(cuda.grid(1)) * count
    if first < n:
        scale = absmax[first >> block_shift]
        for k in range(0, count, 2):
            if first + k < n:
                byte = packed[(first + k) >> 1]
                store(out, first + k, levels[byte >> 4] * scale)
                if first + k + 1 < n:
                    store(out, first + k + 1, levels[byte & 15] * scale)


@cuda.jit(device=True, inline="always")
def read_group(packed, i, out, n, wide):
    """The bytes of group i as one uint32, the first lowest; those past the end are 0."""
    word = uint32(0)
    if i < wide:
        word = load_codes(packed, i, out)
    else:
        count = in_16_bytes(out)
        for k in range(count >> 1):
            if count * i + 2 * k < n:
                word = uint32(word | uint32(uint32(packed[(count >> 1) * i + k]) << uint32(8 * k)))
    return word


@cuda.jit(device=True, inline="always")
def write_group(out, i, n, wide, word, scale, table):
    """The values of group i, whose codes are the bytes of `word`."""
    values = cuda.local.array(8, float32)  # registers: once unrolled, every index is a constant
    count = in_16_bytes(out)
    for k in range(count >> 1):
        byte = uint32(word >> uint32(8 * k))
        values[2 * k] = table[(byte >> uint32(4)) & uint32(15)] * scale
        values[2 * k + 1] = table[byte & uint32(15)] * scale
    if i < wide:
        store16(out, i, values)
    else:
        for k in range(count):
            if count * i + k < n:
                store(out, count * i + k, values[k])


@cuda.jit
def wide(packed, absmax, levels, out, n, block_shift, wide):
    i = int64(cuda.grid(1))
    start = i * in_16_bytes(out)
    if start < n:
        write_group(out, i, n, wide, read_group(packed, i, out, n, wide), absmax[start >> block_shift], levels)


@cuda.jit
def v3(packed, absmax, levels, out, n, block_shift, wide):
    table = cuda.shared.array(16, float32)
    if cuda.threadIdx.x < 16:
        table[cuda.threadIdx.x] = levels[cuda.threadIdx.x]
    cuda.syncthreads()
    i = int64(cuda.grid(1))
    start = i * in_16_bytes(out)
    if start < n:
        write_group(out, i, n, wide, read_group(packed, i, out, n, wide), absmax[start >> block_shift], table)


@cuda.jit
def v4(packed, absmax, levels, out, n, block_shift, wide):
    table = cuda.shared.array(16, float32)
    i = int64(cuda.blockIdx.x) * (2 * cuda.blockDim.x) + cuda.threadIdx.x
    j = i + cuda.blockDim.x
    start_i, start_j = i * in_16_bytes(out), j * in_16_bytes(out)
    word_i = word_j = uint32(0)
    scale_i = scale_j = float32(0)
    if start_i < n:
        word_i, scale_i = read_group(packed, i, out, n, wide), absmax[start_i >> block_shift]
    if start_j < n:
        word_j, scale_j = read_group(packed, j, out, n, wide), absmax[start_j >> block_shift]
    if cuda.threadIdx.x < 16:
        table[cuda.threadIdx.x] = levels[cuda.threadIdx.x]
    cuda.syncthreads()
    if start_i < n:
        write_group(out, i, n, wide, word_i, scale_i, table)
    if start_j < n:
        write_group(out, j, n, wide, word_j, scale_j, table)


@cuda.jit(device=True, inline="always")
def decode(block, codes, group_absmax, offset, code_map, group_shift):
    """A block's absmax from its 8-bit code: a product, then a sum, each rounded (as torch and bitsandbytes do)."""
    return multiply(code_map[codes[block]], group_absmax[block >> group_shift]) + offset[0]


@cuda.jit
def nested(packed, codes, group_absmax, offset, code_map, levels, out, n, block_shift, group_shift, wide):
    table = cuda.shared.array(16, float32)
    decoded = cuda.shared.array(256, float32)  # the code map: so no load has to wait for another
    i = int64(cuda.blockIdx.x) * (2 * cuda.blockDim.x) + cuda.threadIdx.x
    j = i + cuda.blockDim.x
    start_i, start_j = i * in_16_bytes(out), j * in_16_bytes(out)
    word_i = word_j = uint32(0)
    code_i = code_j = uint8(0)
    group_i = group_j = float32(0)
    if start_i < n:
        word_i, code_i = read_group(packed, i, out, n, wide), codes[start_i >> block_shift]
        group_i = group_absmax[start_i >> block_shift >> group_shift]
    if start_j < n:
        word_j, code_j = read_group(packed, j, out, n, wide), codes[start_j >> block_shift]
        group_j = group_absmax[start_j >> block_shift >> group_shift]
    smallest = offset[0]
    for first in range(0, 256, THREADS):
        c = first + cuda.threadIdx.x
        if c < 256:
            decoded[c] = code_map[c]
    if cuda.threadIdx.x < 16:
        table[cuda.threadIdx.x] = levels[cuda.threadIdx.x]
    cuda.syncthreads()
    if start_i < n:
        write_group(out, i, n, wide, word_i, multiply(decoded[code_i], group_i) + smallest, table)
    if start_j < n:
        write_group(out, j, n, wide, word_j, multiply(decoded[code_j], group_j) + smallest, table)


VERSIONS = {"v1": v1, "pair": pair, "eight": eight, "wide": wide, "v2": v2, "v3": v3, "v4": v4}


@functools.lru_cache(maxsize=1024)
def shape(version, n, out_bytes):
    """(blocks, threads a block) that cover n elements of out_bytes each."""
    group = 16 // out_bytes
    shares = {"v1": 2, "pair": 2, "v2": 2, "eight": group, "wide": group, "v3": group}
    elements = shares.get(version, 2 * group)  # of a thread
    return -(-n // (THREADS * elements)), THREADS
