"""Which kernel multiplies so many rows of x by a packed weight, and how it is launched.

    version  takes                                                                     needs
    v6       1 to 128 rows, absmax blocks of 64 or more                                sm_90 alone (warpgroups)
    v5       1 to 8 rows, absmax blocks of 64 or more                                  sm_90 on (bulk copies)
    v4       1 to 64 rows, absmax blocks of 32 or more                                 sm_80 on
    v3       1 to 16 rows, absmax blocks of 64 or more; n multiple of 16, k of 256     sm_80 on
    v2       any number of rows, k multiple of 32, absmax blocks of 32 or more
    v1       anything

v3 to v6 take x in 16 bits, v4 to v6 k a multiple of 64, all but v1 tensors that start on 16 bytes. Asked for a
version that cannot, the next below is taken. "fastest" stands for v5 up to 8 rows, or 2 where n has three or four tiles
of 16 rows for each processor of the GPU, rounded up; then v6, but v4 up to 64 rows where it has one.
"""

import functools
from typing import NamedTuple

import torch

from . import few_rows, gemm_kernels, gemv_kernels, warpgroup_kernels
from .launch import SIMULATOR

VERSIONS = ("v1", "v2", "v3", "v4", "v5", "v6")
MOST_ROWS = warpgroup_kernels.MOST_ROWS
MOST_ROWS_OF_V4 = 64
MOST_WEIGHTS = 2**36  # v4 to v6 count 32 columns at a time, in 32 bits


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
    version = fastest(rows, n, device) if version == "fastest" else version
    tensor_cores = dtype != torch.float32 and aligned and (SIMULATOR or capability(device) >= (8, 0))
    if version >= "v4" and tensor_cores and k % 64 == 0 and block_size >= 32 and n * k < MOST_WEIGHTS:
        whole = block_size >= 64
        bulk = whole and rows <= 8 and (SIMULATOR or capability(device) >= (9, 0))
        one = warpgroup_launch(rows, n, device) if version == "v6" and whole and has_warpgroups(device) else None
        one = one or (few_rows_launch(rows, n, device) if version >= "v5" and bulk else None)
        one = one or gemm_launch(rows, n, block_size, device)
        if one:
            return [one]
    fits = n % 16 == 0 and k % gemv_kernels.STEP == 0 and block_size >= 64 and rows <= 16
    if version >= "v3" and tensor_cores and fits and rows_that_fit(k, device):
        return v3_launches(rows, n, k, device)
    simple = version == "v1" or not aligned or k % 32 or block_size < 32
    warps = gemv_kernels.ROWS_OF_W
    return [Launch(gemv_kernels.v1 if simple else gemv_kernels.v2, -(-rows * n // warps), 32 * warps, 0, None, 0, rows)]


def fastest(rows, n, device):
    """The version in use, as measured on an H200 (`gemv ladder` in benchmarks/results/nvidia-h200.json)."""
    tiles = next(shares(-(-n // 16), device))
    rows_of_v5, rows_of_v4 = 2 if tiles in (3, 4) else 8, MOST_ROWS_OF_V4 if tiles == 1 else 0
    return "v5" if rows <= rows_of_v5 else "v4" if rows <= rows_of_v4 else "v6"


def most_rows(k, block_size, device):
    """The most rows of x (16 bits) that one launch takes by tensor cores."""
    fits = not SIMULATOR and has_warpgroups(device) and block_size >= 64 and k % 64 == 0
    return MOST_ROWS if fits else MOST_ROWS_OF_V4


def few_rows_launch(rows, n, device):
    """v5: as few rounds of the GPU's processors as its shared memory allows, at least three stages."""
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
    if rows > MOST_ROWS_OF_V4:
        return None
    return first_that_fits(gemm_kernels, rows, n, device, block_size)


def warpgroup_launch(rows, n, device):
    """v6, likewise."""
    return None if rows > MOST_ROWS else first_that_fits(warpgroup_kernels, rows, n, device)


def first_that_fits(kernels, rows, n, device, *more):
    """The launch of the first of kernels.layouts(eights of rows, tiles, *more) that fits shared memory, or None."""
    all_tiles = -(-n // 16)
    for tiles in shares(all_tiles, device):
        for layout in kernels.layouts(-(-rows // 8), tiles, *more):
            size = layout.shared_bytes(rows)
            if size <= shared_limit(device):
                grid, registers = -(-all_tiles // tiles), min(255, 65536 // layout.threads)
                return Launch(kernels.kernel(layout), grid, layout.threads, size, registers, 0, rows)
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


def has_warpgroups(device):
    """Whether the GPU is a Hopper: `wgmma` is an instruction of sm_90a, and no later GPU has it."""
    return SIMULATOR or capability(device)[0] == 9


@functools.cache
def capability(device):
    return torch.cuda.get_device_capability(device)


@functools.cache
def processors(device):
    return 4 if SIMULATOR else torch.cuda.get_device_properties(device).multi_processor_count
