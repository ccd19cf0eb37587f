"""The butterflies of the fast Walsh-Hadamard transform, in place: n log2 n additions for a row of n = 2**k.

    a, b -> a + b, a - b        for all pairs that lie 1, 2, 4, …, n / 2 apart

by_halves       whole stages in torch: any device, dtype and width; the one that teaches
on_the_cpu      numba: row by row, which stays in the first-level cache through all stages
cuda.hadamard   numba.cuda: a thread block a row, in shared memory

All give the same bits: a sum of two has one rounding wherever it is made.
"""

import torch

from nf4lab.kernels.cpu import in_threads, jit
from nf4lab.kernels.cuda import hadamard_kernels

ROWS_AT_ONCE = 16


def butterflies_(rows):
    """Each row of a contiguous float tensor (n_rows, 2**k) times Sylvester's Hadamard matrix, unscaled, in place."""
    width = rows.shape[1]
    if rows.device.type == "cpu":
        on_the_cpu(rows.numpy(), torch.get_num_threads())
    elif rows.device.type == "cuda" and rows.dtype == torch.float32:
        piece = min(width, hadamard_kernels.WIDEST)
        hadamard_kernels.butterflies_(rows.view(-1, piece))
        by_halves(rows, piece)
    else:
        by_halves(rows)


def by_halves(rows, apart=1):
    """The stages from pairs `apart` apart on."""
    while apart < rows.shape[1]:
        low, high = rows.view(len(rows), -1, 2, apart).unbind(2)
        low[:], high[:] = low + high, low - high
        apart *= 2


def on_the_cpu(rows, threads=1):
    """The same for a NumPy array (n_rows, 2**k), float32 or float64."""
    chunks = -(-len(rows) // ROWS_AT_ONCE)
    in_threads(_chunks, chunks, min(threads, max(1, rows.size // 2**18)), rows)


@jit
def _chunks(first, last, rows):
    for row in range(first * ROWS_AT_ONCE, min(last * ROWS_AT_ONCE, len(rows))):
        _row(rows[row])


@jit
def _row(values):
    apart = 1
    while apart < values.size:
        for start in range(0, values.size, 2 * apart):
            low, high = values[start : start + apart], values[start + apart : start + 2 * apart]
            for i in range(apart):
                a, b = low[i], high[i]
                low[i], high[i] = a + b, a - b
        apart *= 2
