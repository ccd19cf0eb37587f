"""The kernels for the CPU: tensors in, their memory as NumPy arrays to numba, tensors out."""

import ctypes
import functools
import mmap

import numpy as np
import torch
from torch import Tensor

from nf4lab.formats.format import Format
from nf4lab.formats.normalizations import min_max

CHUNK = 2**16  # elements whose constants are made at once; a multiple of every block size
HUGE_PAGES_FROM = 2**22  # bytes: two huge pages


def quantize(
    flat: Tensor, format: Format, block_size: int, tensor_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """(packed, scale, location) of flat (n,), as the reference makes them; None if a value is not finite."""
    from nf4lab.kernels import cpu

    flat = flat.resolve_neg()
    n, n_blocks = flat.numel(), -(-flat.numel() // block_size)
    packed = empty((n + 1) // 2, torch.uint8, flat.device)
    normalization = _normalization(format)
    if normalization == cpu.GIVEN:
        stored, stored_location, scale, location = _constants(flat, format, block_size, tensor_scale)
    else:
        stored = scale = torch.empty(n_blocks)
        stored_location = location = torch.empty(n_blocks) if normalization == cpu.MIN_MAX else None
    finite = cpu.quantize(
        _array(flat), _kind(flat.dtype), _quantize_table(format), normalization, block_size,
        _array(scale), _array(location), _array(packed), _threads(),
    )  # fmt: skip
    return (packed, stored, stored_location) if finite else None


def _normalization(format: Format) -> int:
    """Which constants the kernel makes itself: those of float32 absmax and min-max. Others are given to it."""
    from nf4lab.kernels import cpu

    if format.constants_dtype != torch.float32:
        return cpu.GIVEN
    if format.scale_is_absmax:
        return cpu.ABSMAX
    return cpu.MIN_MAX if format.normalize is min_max and format.extreme == 1 and not format.search else cpu.GIVEN


def dequantize(q, out: Tensor) -> None:
    """What the QuantizedTensor q stands for, into the contiguous tensor out."""
    from nf4lab.kernels import cpu

    torch.autograd.graph.increment_version(out)  # autograd can't see that NumPy writes to it
    cpu.dequantize(
        _array(q.packed), _dequantize_table(q.format), _array(q.scale), _array(q.location),
        q.block_size, _kind(out.dtype), _array(out), _threads(),
    )  # fmt: skip


def _constants(flat: Tensor, format: Format, block_size: int, tensor_scale: Tensor | None) -> list[Tensor | None]:
    """The four of `Format.constants` that a kernel does not make, by the format's own function, in chunks."""
    whole = flat.numel() - flat.numel() % block_size
    chunks = list(flat[:whole].reshape(-1, block_size).split(CHUNK // block_size)) if whole else []
    if whole < flat.numel():
        chunks.append(flat[whole:].reshape(1, -1))
    search = functools.partial(_search, format=format, block_size=block_size)
    parts = [format.constants(chunk.float(), tensor_scale, search) for chunk in chunks]
    return [None if None in column else torch.cat(column) for column in zip(*parts, strict=True)]


def _search(blocks: Tensor, trials: Tensor, location: Tensor | None, *, format: Format, block_size: int) -> Tensor:
    """What `Format.least_squares` returns, by a kernel."""
    from nf4lab.kernels import cpu

    best = torch.empty(len(blocks), dtype=torch.int64)
    levels = torch.nn.functional.pad(format.levels[format.ascending], (0, 16 - format.levels.numel()))
    cpu.search(
        _array(blocks), trials.numpy(), _array(location), _quantize_table(format)[0], levels.numpy(), block_size,
        best.numpy(), _threads(),
    )  # fmt: skip
    return best


@functools.lru_cache(maxsize=64)
def _quantize_table(format: Format):
    from nf4lab.kernels import cpu

    return cpu.codebook_table(format.boundaries.numpy(), format.ascending.numpy(), format.signed_zero)


@functools.lru_cache(maxsize=64)
def _dequantize_table(format: Format) -> np.ndarray:
    from nf4lab.kernels import cpu

    return cpu.level_pairs(format.levels.numpy())


def _kind(dtype: torch.dtype) -> int:
    from nf4lab.kernels import cpu

    return {torch.float32: cpu.FLOAT32, torch.float16: cpu.FLOAT16, torch.bfloat16: cpu.BFLOAT16}[dtype]


def _array(tensor: Tensor | None) -> np.ndarray:
    """The tensor's memory as a flat array, 16-bit floats as their bit patterns; None as no constants at all."""
    if tensor is None:
        return np.empty(0, np.float32)
    flat = tensor.reshape(-1).contiguous()
    return flat.view(torch.int16).numpy().view(np.uint16) if flat.dtype.itemsize == 2 else flat.numpy()


def _threads() -> int:
    """As many as torch uses, so that torch.set_num_threads and OMP_NUM_THREADS hold, and NUMBA_NUM_THREADS too."""
    import numba

    return min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)


def empty(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor (n,). A large one on the CPU asks Linux for pages of 2 MiB.

    Memory fresh from the system is handed out and cleared page by page, when it is first written; in pages of 4 KiB
    that takes several times as long as writing it.
    """
    tensor = torch.empty(n, dtype=dtype, device=device)
    if device.type != "cpu" or tensor.nbytes < HUGE_PAGES_FROM or torch.compiler.is_compiling():
        return tensor
    if hasattr(mmap, "MADV_HUGEPAGE"):
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = tensor.data_ptr() + tensor.nbytes - start
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)  # advice: may be ignored
    return tensor


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
