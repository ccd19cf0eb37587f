"""Error feedback within a block of columns, on the CPU by numba: each row from left to right, all rows side by side.

A weight is rounded, and what that took away changes the weights to its right: serial along a row. Rows know nothing of
one another, so they go to threads; and passing an error on, which is most of the work, vectorises along the row.
"""

import numpy as np

from nf4lab.kernels.cpu import in_threads, jit, read_only

ROWS_AT_ONCE = 4
BELOW_ZERO = -np.float32(2.0**-149)  # the next float32 below zero, in whose place -0.0 is looked up


def encode_block(block, factor, table, making, reading, codes, threads=1):
    """Codes of block into codes, both (rows, width), with feedback; returns the errors over U_jj, float32 as block.

    block: float32. factor: float32 (width, width), the rows of U. table: from `level_table`. making, reading: float32
    (2, rows), scale and location of each row, with which codes are made and read.
    codes: uint8, written to. Every number of threads gives the same bits.
    """
    errors = np.empty(block.shape, np.float32)
    inputs = [read_only(array) for array in (block, factor)]
    chunks = -(-len(block) // ROWS_AT_ONCE)
    in_threads(_chunks, chunks, threads, *inputs, table, making, reading, codes, errors)
    return errors


def level_table(boundaries, ascending, levels, signed_zero):
    """What `encode_block` needs of a format: boundaries filled up with infinity to 2**k - 1, and the other three."""
    missing = 2 ** int(np.ceil(np.log2(len(boundaries) + 1))) - 1 - len(boundaries)
    filled = np.concatenate([boundaries, np.full(missing, np.inf)]).astype(np.float32)
    return filled, ascending.astype(np.uint8), levels.astype(np.float32), signed_zero


@jit
def code_of(value, boundaries, ascending, signed_zero):
    """The code of a normalised value: how many boundaries lie below it, by binary search, then its place in the order.

    NaN lies above all, as in torch.bucketize.
    """
    if signed_zero and value == 0 and np.signbit(value):
        value = BELOW_ZERO
    rank, step = 0, (boundaries.size + 1) // 2
    while step:
        rank += step if not value <= boundaries[rank + step - 1] else 0
        step //= 2
    return ascending[min(rank, ascending.size - 1)]


@jit
def normalize(value, scale, reciprocal):
    """value / scale: by the reciprocal, or by division where that is infinite; 0/0 is 0."""
    if not np.isinf(reciprocal):
        return value * reciprocal
    quotient = value / scale
    return quotient if quotient == quotient else np.float32(0)


@jit
def _chunks(first, last, block, factor, table, making, reading, codes, errors):
    boundaries, ascending, levels, signed_zero = table
    width = block.shape[1]
    left = np.empty(width, np.float32)
    for row in range(first * ROWS_AT_ONCE, min(last * ROWS_AT_ONCE, len(block))):
        left[:] = block[row]
        reciprocal = np.float32(1) / making[0, row]
        for j in range(width):
            normalized = normalize(left[j] - making[1, row], making[0, row], reciprocal)
            code = code_of(normalized, boundaries, ascending, signed_zero)
            error = (left[j] - (levels[code] * reading[0, row] + reading[1, row])) / factor[j, j]
            codes[row, j], errors[row, j] = code, error
            passed = factor[j]
            for k in range(j + 1, width):
                left[k] -= passed[k] * error
