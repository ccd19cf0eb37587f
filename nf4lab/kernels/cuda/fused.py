"""Which kernel multiplies so many rows of x by a packed weight, and how it is launched.

    version  takes                                                                     needs
    v5       1 to 8 rows, absmax blocks of 64 or more                                  sm_90 (bulk copies)
    v4       1 to 64 rows, absmax blocks of 32 or more                                 sm_80
    v3       1 to 16 rows, absmax blocks of 64 or more; n multiple of 16, k of 256     sm_80
    v2       any number of rows, k multiple of 32, absmax blocks of 32 or more
    v1       anything

v3 to v5 take x in 16 bits, v4 and v5 k a multiple of 64, all but v1 tensors that start on 16 bytes. Asked for a
version that cannot, the next below is taken.
"""

import functools
from typing import NamedTuple

import torch

from . import few_rows, gemm_kernels, gemv_kernels
from .launch import SIMULATOR

VERSIONS = ("v1", "v2", "v3", "v4", "v5")
MOST_ROWS = 64
MOST_WEIGHTS = 2**36  # v4 and v5 count 32 columns at a time, in 32 bits


class Launch(NamedTuple):
    """One launch for rows first..first + rows - 1 of x."""

    kernel: object
    grid: int
    threads: int
    shared_bytes: int
    registers: int | None
    first: int
    rows: int
    numbers: tuple[int, ...] = ()  # arguments of the kernel after those that all take


@functools.lru_cache(maxsize=4096)
def launches(version, rows, n, k, block_size, dtype, device, aligned):
    """The launches that together multiply `rows` rows of x, of `dtype`, on CUDA device number `device`.

    aligned: whether x and the packed weight start on 16 bytes.
    """
    tensor_cores = dtype != torch.float32 and aligned and (SIMULATOR or capability(device) >= (8, 0))
    if version >= "v4" and tensor_cores and k % 64 == 0 and block_size >= 32 and n * k < MOST_WEIGHTS:
        one = few_rows_launch(rows, n, device) if version == "v5" and block_size >= 64 and rows <= 8 else None
        one = one or gemm_launch(rows, n, block_size, device)
        if one:
            return [one]
    fits = n % 16 == 0 and k % gemv_kernels.STEP == 0 and block_size >= 64 and rows <= 16
    if version >= "v3" and tensor_cores and fits and rows_that_fit(k, device):
        return v3_launches(rows, n, k, device)
    simple = version == "v1" or not aligned or k % 32 or block_size < 32
    warps = gemv_kernels.ROWS_OF_W
    return [Launch(gemv_kernels.v1 if simple else gemv_kernels.v2, -(-rows * n // warps), 32 * warps, 0, None, 0, rows)]


def few_rows_launch(rows, n, device):
    """v5: as few rounds of the GPU's processors as its shared memory allows, at least three stages."""
    if not SIMULATOR and capability(device) < (9, 0):
        return None
    all_tiles = -(-n // 16)
    for tiles in shares(all_tiles, device):
        for stages in (4, 3):
            size = few_rows.shared_bytes(rows, tiles, stages)
            if size <= shared_limit(device):
                kernel = few_rows.kernel(stages)
                grid, registers = -(-all_tiles // tiles), 65536 // 512
                return Launch(kernel, grid, few_rows.THREADS, size, registers, 0, rows, (tiles,))
    return None


def gemm_launch(rows, n, block_size, device):
    """v4, likewise, with the fastest layout that fits."""
    if rows > MOST_ROWS:
        return None
    eights = next(e for e in (1, 2, 4, 8) if 8 * e >= rows)
    all_tiles = -(-n // 16)
    for tiles in shares(all_tiles, device):
        for layout in gemm_kernels.layouts(eights, tiles, block_size):
            size = layout.shared_bytes(rows)
            if size <= shared_limit(device):
                kernel = gemm_kernels.kernel(layout)
                grid, registers = -(-all_tiles // tiles), 65536 // layout.threads
                return Launch(kernel, grid, layout.threads, size, registers, 0, rows)
    return None


def v3_launches(rows, n, k, device):
    most, found = rows_that_fit(k, device), []
    for first in range(0, rows, most):
        some = min(most, rows - first)
        kernel = gemv_kernels.TENSOR_CORES[1 if some <= 4 else 2 if some <= 8 else 4]
        grid, size = min(n // 16, processors(device)), 4 * gemv_kernels.shared_words(some, k)
        found.append(Launch(kernel, grid, gemv_kernels.THREADS, size, gemv_kernels.MAX_REGISTERS, first, some))
    return found


def shares(all_tiles, device):
    """Tiles a thread block: for one round of the processors, for two, … down to one tile."""
    share, rounds = 0, 0
    while share != 1:
        rounds += 1
        share = -(-all_tiles // (processors(device) * rounds))
        yield share


@functools.cache
def rows_that_fit(k, device):
    """v3: how many rows of x, at most 16, leave room for the table in a thread block's shared memory."""
    sizes = {rows: 4 * gemv_kernels.shared_words(rows, k) for rows in range(1, 17)}
    return max((rows for rows, size in sizes.items() if size <= shared_limit(device)), default=0)


@functools.cache
def shared_limit(device):
    """Bytes of shared memory that one thread block may have."""
    return 232448 if SIMULATOR else torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@functools.cache
def capability(device):
    return torch.cuda.get_device_capability(device)


@functools.cache
def processors(device):
    return 4 if SIMULATOR else torch.cuda.get_device_properties(device).multi_processor_count
