"""The butterflies of the fast Walsh-Hadamard transform: n log2 n additions for a row of n = 2**k.

    a, b -> a + b, a - b        for all pairs that lie 1, 2, 4, …, n / 2 apart

by_halves       whole stages in torch: any device, dtype and width; the one that teaches
on_the_cpu      numba: row by row, which stays in the first-level cache through all stages
cuda            numba.cuda: a thread block takes pieces from x to the rounded result in one pass

All give the same bits: a sum of two has one rounding wherever it is made.
"""

import torch

from nf4lab.kernels.cpu import in_threads, jit
from nf4lab.kernels.cuda import hadamard_kernels

ROWS_AT_ONCE = 16
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def pieces(x, width, dtype, *, signs=None, after=False, factor=1.0):
    """Each piece of `width` = 2**k values of x (…, n) times Sylvester's Hadamard matrix, times factor: a new tensor.

    Computed in float32, in float64 for a float64 x, and rounded once to dtype. signs: ±1 (n,), multiplied into x, or
    into the result where `after`.
    """
    on_gpu = x.is_cuda and x.dtype in KERNEL_DTYPES and dtype in KERNEL_DTYPES
    if on_gpu and width <= hadamard_kernels.WIDEST:
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        hadamard_kernels.transform(x.contiguous(), out, width, signs=signs, after=after, factor=factor)
        return out
    wide = torch.promote_types(x.dtype, torch.float32)
    before = None if after else signs
    rows = (x.to(wide, copy=True) if before is None else x.to(wide) * before.to(wide)).contiguous()
    butterflies_(rows.view(-1, width))
    made = (rows if factor == 1 else rows.mul_(factor)).to(dtype)
    return made * signs.to(dtype) if after and signs is not None else made


def butterflies_(rows):
    """Each row of a contiguous float tensor (n_rows, 2**k) times Sylvester's Hadamard matrix, unscaled, in place."""
    if rows.device.type == "cpu":
        on_the_cpu(rows.numpy(), torch.get_num_threads())
    elif rows.is_cuda and rows.dtype == torch.float32:
        piece = min(rows.shape[1], hadamard_kernels.WIDEST)
        hadamard_kernels.transform(rows, rows, piece)
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
