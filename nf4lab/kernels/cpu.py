"""Quantize and dequantize on the CPU: numba kernels over NumPy arrays, one idea a version.

quantize_v1    one value at a time: count the boundaries below it
quantize_v2    a chunk of 4096 at a time in short loops, each of which the compiler turns into vector instructions
quantize_v3    4 comparisons a value in place of 15: binary search by selection, without a branch
quantize       v3 in threads: the one in use
encode_constants  codes of constants in a map of up to 256 levels: double quantization
dequantize_v1  one byte at a time: look up two levels, scale each
dequantize_v2  a chunk at a time; one read from a table of all 256 bytes gives both levels
dequantize     v2 in threads: the one in use
repack         codes of one width in another: those of 2 and 3 bits come as 4, and go

v1 takes float32 and absmax only, so that it stays a page to read; the others take everything. 16-bit floats come and
go as uint16 bit patterns, since numba has no float16 on the CPU; `kind` says which of the two they are.

Every value is computed in float32 with one rounding for each operation: numba joins no multiplication and addition
into one (it would need `fastmath`), and a test reads the machine code to be sure.

The threads are our own, over kernels that release Python's lock, rather than numba's `prange`. numba's thread layers
each have a way to end the process: GNU OpenMP in the child of a fork, workqueue under two calling threads. `prange`
also takes for granted that its arrays do not overlap.
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numba
import numpy as np

CHUNK = 4096  # values worked on at once: 16 KiB of float32 stay in the first-level cache; the largest block size
CHUNKS_A_THREAD = 64  # the least work worth a thread: 2**18 values take hundreds of microseconds, a start tens
FLOAT32, FLOAT16, BFLOAT16 = range(3)  # kind: what the 32- or 16-bit patterns stand for
ABSMAX, MIN_MAX, GIVEN = range(3)  # normalization: how constants are made, or that the caller has filled them in

SIGN, MAGNITUDE, INFINITY = np.uint32(0x80000000), np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
# float16 keeps 10 of float32's 23 mantissa bits, and its exponents are biased by 15 in place of 127.
DROPPED = np.uint32(23 - 10)
REBIAS = np.uint32((127 - 15) << 23)
LEAST_NORMAL, OVERFLOW = np.uint32((127 - 14) << 23), np.uint32((127 + 16) << 23)  # the bits of 2**-14 and 2**16
HALF = np.uint32((127 - 1) << 23)  # the bits of 0.5


def jit(function):
    """numba.njit, cached on disk where a cache can be written, without Python's lock and with IEEE division."""
    options = {"nogil": True, "error_model": "numpy"}
    try:
        compiled = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no place for the cache: compile in every process instead
        return numba.njit(**options)(function)
    if cache := getattr(compiled, "_cache", None):  # there is none where NUMBA_DISABLE_JIT is set
        cache.save_overload = where_there_is_room(cache.save_overload)
    return compiled


def where_there_is_room(save):
    """`save`, of numba's cache, that gives up where the disk is full, or has become read-only: the kernel is there."""

    def saved(*arguments):
        with suppress(OSError):
            save(*arguments)

    return saved


# ---- quantize, v1


@jit
def quantize_v1(x, boundaries, ascending, block_size, scale, packed):
    """Codes of float32 x (n,) into packed, uint8 ((n + 1) // 2,), and absmax into scale, float32 (n_blocks,).

    boundaries: float32 (n_levels - 1,), ascending. ascending: uint8 (n_levels,), the codes in order of their levels.
    Returns whether all of x was finite; if it was not, the outputs mean nothing.
    """
    finite = True
    for start in range(0, x.size, block_size):
        block = x[start : start + block_size]
        absmax = np.float32(0)
        for value in block:
            finite &= np.isfinite(value)
            absmax = max(absmax, abs(value))
        scale[start // block_size] = absmax
        reciprocal = np.float32(1) / absmax
        for i in range(block.size + block.size % 2):
            value = block[i] if i < block.size else np.float32(0)  # an odd length is completed with a zero
            if np.isinf(reciprocal):
                normalized = value / absmax if value != 0 else np.float32(0)
            else:
                normalized = value * reciprocal
            rank = 0
            for boundary in boundaries:
                rank += normalized > boundary
            if i % 2 == 0:
                packed[(start + i) // 2] = ascending[rank] << 4
            else:
                packed[(start + i) // 2] |= ascending[rank]
    return finite


# ---- quantize, v2 and v3: a chunk in five short loops


@jit
def absmax(values, block_size, scale):
    """Each block's largest magnitude into scale; returns whether all values are finite.

    Without the sign, floats are in the order of their bits read as integers, and a maximum of integers vectorises.
    The bits of NaN and infinity are INFINITY or above.
    """
    all_bits, scale_bits = values.view(np.uint32), scale.view(np.uint32)
    finite = True
    for b in range(scale.size):
        bits = all_bits[b * block_size : (b + 1) * block_size]
        largest = np.uint32(0)
        for i in range(bits.size):
            largest = max(largest, np.uint32(bits[i] & MAGNITUDE))
        scale_bits[b] = largest
        finite &= largest < INFINITY
    return finite


@jit
def pick(condition, yes, no):
    """One of two values. Both are ready, so the compiler selects and need not branch."""
    return yes if condition else no


@jit
def in_order(bits):
    """int32 bits of a float32 to an int32 that is ordered as the floats are, and back: negatives are flipped."""
    return np.int32(bits ^ np.int32((bits >> np.int32(31)) & np.int32(MAGNITUDE)))


@jit
def min_max(values, block_size, scale, location):
    """Each block's range into scale and least value into location; returns whether all values are finite.

    Adding 0.0 turns -0.0 into 0.0: which zero is the lesser is nowhere defined, and would show in the bytes.
    """
    all_bits = values.view(np.int32)
    finite = True
    for b in range(scale.size):
        bits = all_bits[b * block_size : (b + 1) * block_size]
        least, greatest = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
        for i in range(bits.size):
            least, greatest = min(least, in_order(bits[i])), max(greatest, in_order(bits[i]))
        scale.view(np.int32)[b], location.view(np.int32)[b] = in_order(greatest), in_order(least)
        finite &= np.isfinite(scale[b]) and np.isfinite(location[b])
        location[b] += np.float32(0)
        scale[b] = (scale[b] + np.float32(0)) - location[b]
    return finite


@jit
def make_constants(values, normalization, block_size, scale, location, scratch):
    """Scale and location of each block, unless GIVEN; returns whether all values are finite."""
    if normalization == MIN_MAX:
        return min_max(values, block_size, scale, location)
    return absmax(values, block_size, scale if normalization == ABSMAX else scratch[: scale.size])


@jit
def normalize(values, scale, location, block_size, normalized):
    """(value - location) / scale: by the float32 reciprocal, or by division where that is infinite; 0/0 is 0."""
    for b in range(scale.size):
        block = values[b * block_size : (b + 1) * block_size]
        out = normalized[b * block_size : (b + 1) * block_size]
        divisor, shift = scale[b], location[b] if location.size else np.float32(0)
        reciprocal = np.float32(1) / divisor
        if not np.isinf(reciprocal):
            for i in range(block.size):
                out[i] = (block[i] - shift) * reciprocal
        else:
            for i in range(block.size):
                quotient = (block[i] - shift) / divisor
                out[i] = quotient if quotient == quotient else np.float32(0)


@jit
def lower_negative_zeros(normalized):
    """-0.0 becomes the next float32 below zero: no comparison tells it from 0.0, and it has a code of its own."""
    bits = normalized.view(np.uint32)
    for i in range(normalized.size):
        bits[i] = pick(bits[i] == SIGN, np.uint32(SIGN | np.uint32(1)), bits[i])


@jit
def rank_by_counting(normalized, boundaries, ranks):
    """How many of the 15 boundaries lie below each value: uint8. NaN counts all, as torch.bucketize does."""
    for i in range(normalized.size):
        rank = np.uint8(0)
        for k in range(15):
            rank += np.uint8(not normalized[i] <= boundaries[k])
        ranks[i] = rank


@jit
def rank_by_search(normalized, boundaries, ranks):
    """The same by binary search: each comparison halves the boundaries that are left, 15 to 7 to 3 to 1."""
    b0, b1, b2, b3, b4, b5, b6, b7 = boundaries[:8]
    b8, b9, b10, b11, b12, b13, b14 = boundaries[8:15]
    for i in range(normalized.size):
        value = normalized[i]
        above8 = not value <= b7
        c0, c1, c2, c3 = pick(above8, b8, b0), pick(above8, b9, b1), pick(above8, b10, b2), pick(above8, b11, b3)
        c4, c5, c6 = pick(above8, b12, b4), pick(above8, b13, b5), pick(above8, b14, b6)
        above4 = not value <= c3
        d0, d1, d2 = pick(above4, c4, c0), pick(above4, c5, c1), pick(above4, c6, c2)
        above2 = not value <= d1
        above1 = not value <= pick(above2, d2, d0)
        halves = pick(above8, np.uint8(8), np.uint8(0)) + pick(above4, np.uint8(4), np.uint8(0))
        ranks[i] = halves + pick(above2, np.uint8(2), np.uint8(0)) + np.uint8(above1)


@jit
def pack(ranks, recode, packed):
    """Two ranks to a byte, the even one high; `recode` turns a byte of ranks into one of codes, if it has entries."""
    for j in range(packed.size):
        packed[j] = ranks[2 * j] << 4 | ranks[2 * j + 1]
    if recode.size:
        for j in range(packed.size):
            packed[j] = recode[packed[j]]


@jit
def quantize_chunk(values, table, search, normalization, block_size, scale, location, packed, scratch):
    """One chunk: constants, normalized values, ranks, bytes. Returns whether its values are finite."""
    boundaries, recode, signed_zero = table
    normalized, ranks = scratch
    finite = make_constants(values, normalization, block_size, scale, location, normalized)
    normalize(values, scale, location, block_size, normalized)
    padded = values.size + values.size % 2
    normalized[values.size : padded] = 0  # an odd length is completed with the code of zero
    if signed_zero:
        lower_negative_zeros(normalized[: values.size])
    if search:
        rank_by_search(normalized[:padded], boundaries, ranks)
    else:
        rank_by_counting(normalized[:padded], boundaries, ranks)
    pack(ranks, recode, packed)
    return finite


@jit
def quantize_chunks(first, last, x, kind, table, search, normalization, block_size, scale, location, packed):
    """Chunks first..last-1 of float32 x, or of 16-bit x after widening; returns whether they were finite."""
    widened = np.empty(CHUNK, np.float32)
    scratch = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.uint8)
    blocks = CHUNK // block_size
    finite = True
    for c in range(first, last):
        values = widen(x[c * CHUNK : (c + 1) * CHUNK], kind, widened)
        finite &= quantize_chunk(
            values, table, search, normalization, block_size,
            scale[c * blocks : (c + 1) * blocks], location[c * blocks : (c + 1) * blocks],
            packed[c * CHUNK // 2 : (c + 1) * CHUNK // 2], scratch,
        )  # fmt: skip
    return finite


def quantize_v2(x, kind, table, normalization, block_size, scale, location, packed):
    """As `quantize`, in one thread and by 15 comparisons."""
    x = read_only(x)
    return quantize_chunks(0, count(x), x, kind, table, False, normalization, block_size, scale, location, packed)


def quantize_v3(x, kind, table, normalization, block_size, scale, location, packed):
    """As `quantize`, in one thread."""
    x = read_only(x)
    return quantize_chunks(0, count(x), x, kind, table, True, normalization, block_size, scale, location, packed)


def quantize(x, kind, table, normalization, block_size, scale, location, packed, threads=1):
    """Codes of x into packed and its constants into scale and location; returns whether all of x was finite.

    x: float32 (n,), or uint16 (n,) bit patterns of `kind` FLOAT16 or BFLOAT16. packed: uint8 ((n + 1) // 2,).
    table: from `codebook_table`. block_size: a power of two, 2 to CHUNK.
    scale: float32 (n_blocks,). location: the same, or float32 (0,) where blocks are not shifted.
    normalization: ABSMAX and MIN_MAX make the constants; with GIVEN they are read from scale and location.
    If x was not finite the outputs mean nothing. Every number of threads gives the same bytes.
    Raises ValueError where the lengths disagree or an output is read-only.
    """
    check_lengths(x.size, block_size, scale, location, packed)
    if normalization == MIN_MAX and location.size != scale.size:
        raise ValueError(f"min-max makes a location for each of {scale.size} blocks; there is room for {location.size}")
    check_writeable(scale, location, packed)
    arguments = (kind, table, True, normalization, block_size, scale, location, packed)
    return all(in_threads(quantize_chunks, count(x), threads, read_only(x), *arguments))


def codebook_table(boundaries, ascending, signed_zero=False):
    """What `quantize` needs of a codebook of 2 to 16 levels: 15 boundaries in a tuple, uint8 (256,) or (0,), a bool.

    boundaries: float32 (n_levels - 1,), ascending. ascending: (n_levels,), the codes in order of their levels.
    Boundaries that are missing are infinite: no value lies above them. The array turns two ranks in a byte into two
    codes; it is empty where ranks are codes already. The bool, signed_zero, says that -0.0 has a code of its own.
    """
    n_levels = len(ascending)
    codes = np.minimum(np.arange(16), n_levels - 1)  # NaN, above every boundary, takes the last level
    codes = np.asarray(ascending, np.uint8)[codes]
    padded = np.concatenate([boundaries, np.full(16 - n_levels, np.inf)]).astype(np.float32)
    recode = (codes[:, None] << 4 | codes).reshape(-1).astype(np.uint8)
    if np.array_equal(codes, np.arange(16)):
        recode = recode[:0]
    return tuple(padded), recode, signed_zero


# ---- what other constants are made from


@jit
def extremes_chunks(first, last, x, kind, block_size, extreme):
    """Chunks first..last-1 of `extremes`. Always True."""
    widened = np.empty(CHUNK, np.float32)
    blocks = CHUNK // block_size
    for c in range(first, last):
        values = widen(x[c * CHUNK : (c + 1) * CHUNK], kind, widened)
        found = extreme[c * blocks : (c + 1) * blocks]
        absmax(values, block_size, found)
        bits, found_bits = values.view(np.uint32), found.view(np.uint32)
        for b in range(found.size):
            i = b * block_size
            while np.uint32(bits[i] & MAGNITUDE) != found_bits[b]:
                i += 1
            found_bits[b] = bits[i]
    return True


def extremes(x, kind, block_size, extreme, threads=1):
    """The first value of largest magnitude in each block of x into extreme, float32 (n_blocks,), with its sign.

    x, kind, block_size: as for `quantize`. Of a block with NaN the NaN of greatest bits, without its sign, is largest.
    Raises ValueError where the lengths disagree or extreme is read-only.
    """
    check_lengths(x.size, block_size, extreme, extreme, np.empty((x.size + 1) // 2, np.uint8))
    check_writeable(extreme)
    in_threads(extremes_chunks, count(x), threads, read_only(x), kind, block_size, extreme)


# ---- the search for a scale


@jit
def normalize_all(values, scale, location, block_size, normalized):
    """`normalize`, without the slices that take most of the time in small blocks; a tiny scale goes to `normalize`."""
    for b in range(scale.size):
        start, stop = b * block_size, min((b + 1) * block_size, values.size)
        reciprocal = np.float32(1) / scale[b]
        if np.isinf(reciprocal):
            normalize(values[start:stop], scale[b : b + 1], location[b : b + 1], block_size, normalized[start:stop])
            continue
        shift = location[b] if location.size else np.float32(0)
        for i in range(start, stop):
            normalized[i] = (values[i] - shift) * reciprocal


@jit
def square_errors(normalized, ranks, levels):
    """Each normalized value replaced by the square of its distance from its level."""
    for i in range(ranks.size):
        error = normalized[i] - levels[ranks[i]]
        normalized[i] = error * error


@jit
def sum_in_lanes(values, start, stop):
    """The float32 sum of values[start:stop], a multiple of 8: every eighth in a sum of its own, then by halves."""
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = np.float32(0)
    for i in range(start, stop, 8):
        s0, s1, s2, s3 = s0 + values[i], s1 + values[i + 1], s2 + values[i + 2], s3 + values[i + 3]
        s4, s5, s6, s7 = s4 + values[i + 4], s5 + values[i + 5], s6 + values[i + 6], s7 + values[i + 7]
    s0, s1, s2, s3 = s0 + s4, s1 + s5, s2 + s6, s3 + s7
    return (s0 + s2) + (s1 + s3)


@jit
def search_chunks(first, last, x, trials, location, boundaries, levels, block_size, best):
    """Chunks first..last-1 of `search`. Always True."""
    normalized, ranks = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.uint8)
    least = np.empty(CHUNK // block_size, np.float32)
    blocks = CHUNK // block_size
    for c in range(first, last):
        values, b = x[c * CHUNK : (c + 1) * CHUNK], slice(c * blocks, (c + 1) * blocks)
        chosen, unsearched = best[b], trials[0, b]
        for k in range(trials.shape[0]):
            scale = trials[k, b]
            normalize_all(values, scale, location[b], block_size, normalized)
            rank_by_search(normalized[: values.size], boundaries, ranks)
            square_errors(normalized, ranks[: values.size], levels)
            normalized[values.size :] = 0  # a short last block is filled up with zeros
            for i in range(scale.size):
                ratio = scale[i] / unsearched[i]
                cost = sum_in_lanes(normalized, i * block_size, (i + 1) * block_size) * (ratio * ratio)
                if k == 0 or cost < least[i]:
                    least[i], chosen[i] = cost, k
    return True


def search(x, trials, location, boundaries, levels, block_size, best, threads=1):
    """Which of its trial scales costs each block least, the first of equal ones, into best, int64 (n_blocks,).

    x: float32 (n,). trials: float32 (n_trials, n_blocks). location: float32 (n_blocks,) or (0,). boundaries: the
    tuple of 15 from `codebook_table`. levels: float32 (16,), ascending, those that are missing filled in with any.
    Costs are measured in units of the first trial, in which they cannot overflow.
    Raises ValueError where the lengths disagree or best is read-only.
    """
    check_lengths(x.size, block_size, best, location, np.empty((x.size + 1) // 2, np.uint8))
    check_writeable(best)
    if trials.shape[1:] != best.shape or levels.size != 16:
        raise ValueError(
            f"{best.size} blocks take trials (n, {best.size}) and 16 levels; got {trials.shape}, {levels.size}"
        )
    inputs = [read_only(array) for array in (x, trials, location)]
    in_threads(search_chunks, count(x), threads, *inputs, boundaries, read_only(levels), block_size, best)


# ---- constants, quantized too


@jit
def encode_constants(constants, offset, table, group_size, codes, group_absmax):
    """Codes of constants - offset, float32 (n,), into codes, uint8 (n,), and each group's absmax into group_absmax.

    offset: a float32. table: from `map_table`. group_size: from 1 up, any. group_absmax: float32 (n_groups,).
    The levels are found by binary search without a branch: each step takes the upper half or leaves it.
    """
    boundaries, ascending = table
    normalized = constants - offset
    absmax(normalized, group_size, group_absmax)
    normalize(normalized, group_absmax, group_absmax[:0], group_size, normalized)
    for i in range(codes.size):
        rank, step = 0, ascending.size // 2
        while step:
            rank += pick(normalized[i] <= boundaries[rank + step - 1], 0, step)
            step //= 2
        codes[i] = ascending[rank]


def map_table(boundaries, ascending):
    """What `encode_constants` needs of a map of 2 to 256 levels: both arrays filled up for a power of two of levels.

    boundaries: float32 (n_levels - 1,), ascending. ascending: (n_levels,), the codes in order of their levels.
    Boundaries that are missing are infinite: no value lies above them, and NaN takes the last level.
    """
    missing = (1 << (len(ascending) - 1).bit_length()) - len(ascending)
    filled = np.pad(boundaries, (0, missing), constant_values=np.inf).astype(np.float32)
    return filled, np.pad(ascending, (0, missing), mode="edge").astype(np.uint8)


# ---- dequantize, v1


@jit
def dequantize_v1(packed, levels, scale, block_size, out):
    """levels[code] * scale of its block into float32 out (n,). packed: uint8 ((n + 1) // 2,), two codes to a byte."""
    for j in range(packed.size):
        absmax = scale[2 * j // block_size]
        out[2 * j] = levels[packed[j] >> 4] * absmax
        if 2 * j + 1 < out.size:
            out[2 * j + 1] = levels[packed[j] & 15] * absmax


# ---- dequantize, v2: a chunk in three short loops


@jit
def unpack(packed, pairs, values):
    """Both levels of each byte, 8 bytes at once: values[2j], values[2j + 1] = pairs[packed[j]]."""
    values_in_pairs = values.view(np.uint64)
    for j in range(packed.size):
        values_in_pairs[j] = pairs[packed[j]]


@jit
def denormalize(values, scale, location, block_size, out):
    """value * scale, then + location where there is one, each rounded to float32; out may be values."""
    for b in range(scale.size):
        block, target = values[b * block_size : (b + 1) * block_size], out[b * block_size : (b + 1) * block_size]
        factor = scale[b]
        if location.size:
            shift = location[b]
            for i in range(target.size):
                target[i] = block[i] * factor + shift
        else:
            for i in range(target.size):
                target[i] = block[i] * factor


@jit
def dequantize_chunks(first, last, packed, pairs, scale, location, block_size, kind, out):
    """Chunks first..last-1 into out: float32, or 16-bit patterns of `kind`. Always True."""
    values = np.empty(CHUNK, np.float32)
    blocks = CHUNK // block_size
    for c in range(first, last):
        unpack(packed[c * CHUNK // 2 : (c + 1) * CHUNK // 2], pairs, values)
        chunk = out[c * CHUNK : (c + 1) * CHUNK]
        target = in_float32(chunk, values)
        b = slice(c * blocks, (c + 1) * blocks)
        denormalize(values, scale[b], location[b], block_size, target)
        narrow(target, kind, chunk)
    return True


def dequantize_v2(packed, pairs, scale, location, block_size, kind, out):
    """As `dequantize`, in one thread."""
    inputs = [read_only(array) for array in (packed, pairs, scale, location)]
    dequantize_chunks(0, count(out), *inputs, block_size, kind, out)


def dequantize(packed, pairs, scale, location, block_size, kind, out, threads=1):
    """location + scale * levels[code] into out: float32 (n,), or uint16 (n,) bit patterns of `kind`.

    packed: uint8 ((n + 1) // 2,). pairs: from `level_pairs`. scale: float32 (n_blocks,). location: the same, or
    float32 (0,). The product and the sum are rounded to float32 each, the result once more for 16 bits, to nearest
    with ties to even. out must not overlap the inputs.
    Raises ValueError where the lengths disagree or out is read-only.
    """
    check_lengths(out.size, block_size, scale, location, packed)
    check_writeable(out)
    inputs = [read_only(array) for array in (packed, pairs, scale, location)]
    in_threads(dequantize_chunks, count(out), threads, *inputs, block_size, kind, out)


def level_pairs(levels):
    """The two levels that each byte stands for, as one uint64: (256,). Codes without a level stand for 0."""
    by_code = np.zeros(16, np.float32)
    by_code[: len(levels)] = levels
    byte = np.arange(256)
    return by_code[np.stack([byte >> 4, byte & 15], axis=1)].view(np.uint64).reshape(-1)


# ---- codes of other widths


@jit
def repack_chunks(first, last, packed, bits, wanted, n, out):
    """Chunks first..last-1 of `repack`, without the last codes that are fewer than eight. Always True."""
    mask = np.uint64((1 << bits) - 1)
    for group in range(first * CHUNK // 8, min(last * CHUNK, n) // 8):
        word = made = np.uint64(0)
        for i in range(bits):
            word = word << np.uint64(8) | np.uint64(packed[group * bits + i])
        for i in range(7, -1, -1):
            made = made << np.uint64(wanted) | (word >> np.uint64(bits * i) & mask)
        for i in range(wanted):
            out[group * wanted + i] = np.uint8(made >> np.uint64(8 * (wanted - 1 - i)))
    return True


def repack(packed, n, bits, wanted, pad, out, threads=1):
    """The first n codes of packed bytes in another width into out, its last byte completed with codes `pad`.

    packed: uint8 (ceil(n * bits / 8),). out: uint8 (ceil(n * wanted / 8),). Eight codes fill whole bytes in every
    width from 1 to 8 bits, and are taken together.
    Raises ValueError where the lengths disagree or out is read-only.
    """
    check_writeable(out)
    if (packed.size, out.size) != (-(-n * bits // 8), -(-n * wanted // 8)):
        raise ValueError(f"{n} codes of {bits} and of {wanted} bits; got {packed.size} and {out.size} bytes")
    in_threads(repack_chunks, -(-n // CHUNK), threads, read_only(packed), bits, wanted, n, out)
    whole, rest = divmod(n, 8)
    word = int.from_bytes(packed[whole * bits :].tobytes().ljust(bits, b"\0"), "big")
    codes = [word >> bits * (7 - i) & 2**bits - 1 if i < rest else pad for i in range(8)]
    made = sum(code << wanted * (7 - i) for i, code in enumerate(codes)).to_bytes(wanted, "big")
    out[whole * wanted :] = np.frombuffer(made, np.uint8)[: out.size - whole * wanted]


# ---- 16-bit floats


@jit
def widen_float16(half, values):
    """float16 patterns, uint16 (n,), as float32 (n,): exact; subnormals, infinities, NaN included.

    Shifted into place, a float16 reads as a float32 that is 2**112 too small, subnormals too.
    """
    bits = values.view(np.uint32)
    for i in range(half.size):
        pattern = np.uint32(half[i])
        bits[i] = (pattern & np.uint32(0x7FFF)) << DROPPED | (pattern & np.uint32(0x8000)) << np.uint32(16)
    for i in range(half.size):
        values[i] *= np.float32(2.0**112)
    for i in range(half.size):
        overflowed = np.uint32(bits[i] & MAGNITUDE) >= OVERFLOW  # above every finite float16
        bits[i] = pick(overflowed, np.uint32(bits[i] | INFINITY), bits[i])


@jit
def widen_bfloat16(half, values):
    """bfloat16 patterns, uint16 (n,), as float32 (n,): they are its upper halves."""
    bits = values.view(np.uint32)
    for i in range(half.size):
        bits[i] = np.uint32(half[i]) << np.uint32(16)


@jit
def narrow_float16(values, half):
    """float32 (n,) to float16 patterns, uint16 (n,): to nearest, ties to even; 65520 and above to infinity.

    A normal float16 drops 13 bits of the mantissa. A subnormal one, below 2**-14, counts in steps of 2**-24, and so
    does float32 from 0.5 on: adding 0.5 rounds to that step, and the count stands in the low bits of the sum.
    """
    sums = np.empty(half.size, np.float32)
    for i in range(half.size):
        sums[i] = abs(values[i]) + np.float32(0.5)
    bits, sum_bits = values.view(np.uint32), sums.view(np.uint32)
    for i in range(half.size):
        magnitude = np.uint32(bits[i] & MAGNITUDE)
        subnormal = np.uint32(sum_bits[i] - HALF)
        odd = np.uint32(np.uint32(magnitude >> DROPPED) & np.uint32(1))
        normal = np.uint32(np.uint32(magnitude - REBIAS + np.uint32(0xFFF) + odd) >> DROPPED)
        rounded = pick(magnitude < LEAST_NORMAL, subnormal, normal)
        rounded = pick(magnitude >= OVERFLOW, np.uint32(0x7C00), rounded)
        rounded = pick(magnitude > INFINITY, np.uint32(0x7E00), rounded)
        half[i] = np.uint16(rounded | np.uint32(np.uint32(bits[i] & SIGN) >> np.uint32(16)))


@jit
def narrow_bfloat16(values, half):
    """float32 (n,) to bfloat16 patterns, uint16 (n,): to nearest, ties to even; NaN to 0x7FC0 (torch: by the CPU)."""
    bits = values.view(np.uint32)
    for i in range(half.size):
        odd = np.uint32(bits[i] >> np.uint32(16)) & np.uint32(1)
        rounded = np.uint32(np.uint32(bits[i] + np.uint32(0x7FFF) + odd) >> np.uint32(16))
        is_nan = np.uint32(bits[i] & MAGNITUDE) > INFINITY
        half[i] = np.uint16(pick(is_nan, np.uint32(0x7FC0), rounded))


def widen(x, kind, widened):
    """float32 x as it is, 16-bit patterns widened into the start of `widened`: float32 (n,)."""


@numba.extending.overload(widen)
def _widen(x, kind, widened):
    if x.dtype == numba.float32:
        return lambda x, kind, widened: x

    def widen_16_bits(x, kind, widened):
        if kind == FLOAT16:
            widen_float16(x, widened[: x.size])
        else:
            widen_bfloat16(x, widened[: x.size])
        return widened[: x.size]

    return widen_16_bits


def in_float32(out, values):
    """Where float32 results for `out` go: to float32 out itself, for 16 bits to the start of `values`."""


@numba.extending.overload(in_float32)
def _in_float32(out, values):
    if out.dtype == numba.float32:
        return lambda out, values: out
    return lambda out, values: values[: out.size]


def narrow(values, kind, out):
    """float32 values into 16-bit patterns `out`; nothing where out is float32 and holds them already."""


@numba.extending.overload(narrow)
def _narrow(values, kind, out):
    if out.dtype == numba.float32:
        return lambda values, kind, out: None

    def narrow_16_bits(values, kind, out):
        if kind == FLOAT16:
            narrow_float16(values, out)
        else:
            narrow_bfloat16(values, out)

    return narrow_16_bits


# ---- threads


@functools.cache
def pool():
    """The threads, started when first used; a forked child, which inherits none, starts its own."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="nf4lab")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=pool.cache_clear)


def in_threads(kernel, chunks, threads, *arguments):
    """What kernel(first, last, *arguments) returns for each of at most `threads` runs that make up all chunks."""
    parts = max(1, min(threads, chunks // CHUNKS_A_THREAD))
    edges = [chunks * part // parts for part in range(parts + 1)]
    others = [pool().submit(kernel, *edges[part : part + 2], *arguments) for part in range(1, parts)]
    return [kernel(0, edges[1], *arguments), *(other.result() for other in others)]


def count(x):
    """How many chunks x makes, the short last one included."""
    return -(-x.size // CHUNK)


def read_only(array):
    """A view that can't be written through: numba then compiles once for inputs that are read-only and that are not."""
    view = array.view()
    view.flags.writeable = False
    return view


def check_lengths(n, block_size, scale, location, packed):
    """Raise ValueError unless the arrays have the lengths that n values in blocks of block_size take."""
    if block_size < 1 or CHUNK % block_size:
        raise ValueError(f"block_size must divide {CHUNK}; got {block_size}")
    n_blocks = -(-n // block_size)
    if packed.size != (n + 1) // 2 or scale.size != n_blocks or location.size not in (0, n_blocks):
        raise ValueError(
            f"{n} values in blocks of {block_size} take {(n + 1) // 2} bytes and {n_blocks} constants; "
            f"got {packed.size}, {scale.size} of scale, {location.size} of location"
        )


def check_writeable(*outputs):
    """Raise ValueError if an output is read-only."""
    if not all(output.flags.writeable for output in outputs):
        raise ValueError("an output array is read-only")
