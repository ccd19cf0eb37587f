"""Calls made ready: what cannot change between two calls with one weight is done once, here.

`gemv` and `dequantize` look at a dozen arguments each time; a prepared call looks at three addresses, packs them with
those it knows into the argument block, and launches. Of the weight it holds addresses and no tensors (what it keeps are
the tables: levels and code map): whoever calls keeps the weight's tensors alive, and prepares again where one has
moved. It launches on torch's current stream, can be captured in a CUDA graph once it has run, and may be called from
several threads.
"""

import torch

from . import dequantize_kernels, fused
from .checks import BYTE, FLOAT32, FLOATS, expect, expect_block_size, expect_nested
from .crossover import rows_worth_it
from .fused import most_rows
from .launch import load, loaded_kernels


def prepare_gemv(packed, absmax, levels, *, shape, block_size, dtype):
    """A call (x, bias, out, rows) that does what `gemv` does for this weight (n, k) and this dtype of x.

    x (rows, k) and out (rows, n) are contiguous, bias is None or (n,), all of dtype and on packed's device; rows is 1
    to `.rows`. None of that is checked. `.nbytes`: bytes held beyond the tensors given. Errors as `gemv`.
    """
    n, k = shape
    addresses, group_size, tables = _weight(packed, absmax, levels, n * k, block_size, dtype)
    return PreparedGemv(addresses, tables, packed, (n, k), block_size, group_size, dtype)


def prepare_dequantize(packed, absmax, levels, *, n, block_size, dtype):
    """A call (out) that fills out (n elements, contiguous, of dtype, on packed's device) as `dequantize` does."""
    addresses, group_size, tables = _weight(packed, absmax, levels, n, block_size, dtype)
    return PreparedDequantize(addresses, tables, packed, n, block_size, group_size, dtype)


def _weight(packed, absmax, levels, n, block_size, dtype):
    """The checked weight: addresses by name, group size (0 for a plain absmax), and the tables to keep."""
    device = packed.get_device()
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be {' or '.join(map(str, FLOATS))}; got {dtype}")
    expect_block_size("block_size", block_size)
    expect("packed", packed, BYTE, (n + 1) // 2, device)
    expect("levels", levels, FLOAT32, 16, device)
    n_blocks = -(-n // block_size)
    addresses = {"packed": packed.data_ptr(), "levels": levels.data_ptr()}
    if not isinstance(absmax, tuple):
        expect("absmax", absmax, FLOAT32, n_blocks, device)
        return addresses | {"absmax": absmax.data_ptr()}, 0, (levels,)
    expect_nested(absmax, n_blocks, device)
    *parts, group_size = absmax
    names = "codes", "group_absmax", "offset", "code_map"
    nested = {name: part.data_ptr() for name, part in zip(names, parts, strict=True)}
    return addresses | nested, group_size, (levels, parts[-1])


class PreparedGemv:
    """See `prepare_gemv`."""

    nbytes = 0

    def __init__(self, addresses, tables, packed, shape, block_size, group_size, dtype):
        self.device, self.dtype, self.shape, self.block_size = packed.get_device(), dtype, shape, block_size
        self.tables = tables
        unused = addresses.get("absmax", addresses.get("group_absmax"))  # what the kernel does not touch
        names = ("packed", "absmax", "codes", "group_absmax", "offset", "code_map", "levels")
        self.weight = tuple(addresses.get(name, unused) for name in names)
        self.numbers = *shape, block_size.bit_length() - 1, max(group_size, 1).bit_length() - 1, int(group_size > 0)
        self.rows = min(rows_worth_it(*shape, dtype, self.device), most_rows(shape[1], block_size, self.device))
        self.pieces = {}

    def __call__(self, x, bias, out, rows):
        x_at, y_at = x.data_ptr(), out.data_ptr()
        if x_at & 15:  # a view that starts in between: the kernels read 16 bytes at once
            x = x.clone()
            x_at = x.data_ptr()
        has_bias = bias is not None
        bias_at = bias.data_ptr() if has_bias else y_at
        weight, numbers = self.weight, self.numbers
        for start, shape, x_offset, y_offset, some, more in self.pieces.get(rows) or self.plan(rows):
            start(*shape, (x_at + x_offset, *weight, bias_at, y_at + y_offset, some, *numbers, has_bias, *more))

    def plan(self, rows):
        """The launches that this many rows take, loaded: (start, grid and so on, offsets of x and y, rows, numbers)."""
        (n, k), width = self.shape, self.dtype.itemsize
        case = "fastest", rows, n, k, self.block_size, self.dtype, self.device, self.weight[0] % 16 == 0
        pieces = []
        for one in fused.launches(*case):
            kinds = (*GEMV_ARGUMENTS, *[int] * len(one.numbers))
            start = _loaded(one.kernel, self.dtype, self.device, kinds, one.shared_bytes, one.registers).start
            shape = one.grid, one.threads, one.shared_bytes
            offsets = one.first * k * width, one.first * n * width
            pieces.append((start, shape, *offsets, one.rows, one.numbers))
        self.pieces[rows] = pieces
        return pieces


class PreparedDequantize:
    """See `prepare_dequantize`."""

    def __init__(self, addresses, tables, packed, n, block_size, group_size, dtype):
        self.tables, self.n = tables, n
        names = ("packed", "codes", "group_absmax", "offset", "code_map", "levels")
        names = names if group_size else ("packed", "absmax", "levels")
        self.weight = tuple(addresses[name] for name in names)
        self.shifts = (block_size.bit_length() - 1, *([group_size.bit_length() - 1] if group_size else []))
        group = 16 // dtype.itemsize
        self.wide = n // group if packed.data_ptr() % (group // 2) == 0 else 0
        kernel, version = (dequantize_kernels.nested, "nested") if group_size else (dequantize_kernels.v4, "v4")
        kinds = NESTED_ARGUMENTS if group_size else PLAIN_ARGUMENTS
        self.shape = (*dequantize_kernels.shape(version, n, dtype.itemsize), 0) if n else None
        self.start = _loaded(kernel, dtype, packed.get_device(), kinds, 0, None).start

    def __call__(self, out):
        out_at = out.data_ptr()
        if self.n:
            wide = 0 if out_at & 15 else self.wide
            self.start(*self.shape, (*self.weight, out_at, self.n, *self.shifts, wide))


# The kernels' arguments, in order: a dtype for a pointer ("any" for the one that is prepared for), int for a number.
WEIGHT = (torch.uint8, torch.float32, torch.uint8, torch.float32, torch.float32, torch.float32, torch.float32)
GEMV_ARGUMENTS = ("any", *WEIGHT, "any", "any", *[int] * 7)
NESTED_ARGUMENTS = (torch.uint8, torch.uint8, *[torch.float32] * 4, "any", *[int] * 4)
PLAIN_ARGUMENTS = (torch.uint8, torch.float32, torch.float32, "any", *[int] * 3)


def _loaded(kernel, dtype, device, kinds, shared, registers):
    """The kernel in the device's memory, compiled for arguments of these kinds."""
    key = (kernel, device, dtype)
    if key not in loaded_kernels:
        like = [0 if kind is int else torch.empty(0, dtype=dtype if kind == "any" else kind) for kind in kinds]
        load(kernel, like, device, key, shared, registers)
    return loaded_kernels[key]
