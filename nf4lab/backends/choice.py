"""Who does the work: the torch reference, the numba kernels on the CPU, or those on a GPU. All give the same bytes.

A backend other than the reference is two functions here, with the signatures of `quantize_cpu` and `dequantize_cpu`,
and an entry in the two tables at the bottom. Kernels are imported when first used: importing nf4lab compiles nothing
and does not load numba.
"""

import ctypes
import functools
import math
import mmap

import numpy as np
import torch
from torch import Tensor

from nf4lab.formats.double_quant import MAPS, QuantizedConstants
from nf4lab.formats import Format, min_max

BACKENDS = ("torch", "cpu", "cuda")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The kernels win at every size once they are loaded (benchmarks/cpu.py). Below this many elements the reference takes
# about a millisecond, and is not worth the second that importing numba takes, or a first compilation.
CPU_FROM = 2**16
CHUNK = 2**16  # elements whose constants are made at once; a multiple of every block size
GEMV_ROWS = 16  # rows of x that the fused kernel takes at most
HUGE_PAGES_FROM = 2**22  # bytes: two huge pages


def choose(backend: str | None, device: torch.device, dtype: torch.dtype, n: int, format: Format) -> str:
    """The backend asked for, or for None the fastest that serves n elements of that dtype and format on that device.

    Raises ValueError for an unknown backend or one that does not take this device, dtype or format, RuntimeError for
    one that cannot run here.
    """
    if backend is None:
        return _fastest(device, dtype, n, format)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be None, 'torch', 'cpu' or 'cuda'; got {backend!r}")
    if backend == "torch":
        return backend
    if device.type != backend:
        raise ValueError(f"backend {backend!r} takes tensors on {backend}; got one on {device}")
    if dtype not in KERNEL_DTYPES:
        raise ValueError(f"backend {backend!r} takes float32, float16 and bfloat16; got {dtype}")
    if backend == "cuda" and not _cuda_takes(format):
        raise ValueError(f"backend 'cuda' takes formats scaled by a float32 absmax; got {format.name!r}")
    if backend == "cuda" and (missing := _cuda_missing()):
        raise RuntimeError(f"backend 'cuda' cannot run: {missing}")
    return backend


def _fastest(device: torch.device, dtype: torch.dtype, n: int, format: Format) -> str:
    if dtype not in KERNEL_DTYPES or torch.compiler.is_compiling():  # torch.compile sees into the reference only
        return "torch"
    if device.type == "cpu" and n >= CPU_FROM:
        return "cpu"
    return "cuda" if device.type == "cuda" and _cuda_takes(format) and not _cuda_missing() else "torch"


def _cuda_takes(format: Format) -> bool:
    return format.scale_is_absmax and format.constants_dtype == torch.float32 and not format.signed_zero


def _cuda_missing() -> str | None:
    from nf4lab.kernels import cuda

    return cuda.available()


def quantize_cpu(
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


def dequantize_cpu(q, out: Tensor) -> None:
    """What the QuantizedTensor q stands for, into the contiguous tensor out."""
    from nf4lab.kernels import cpu

    torch.autograd.graph.increment_version(out)  # autograd can't see that NumPy writes to it
    cpu.dequantize(
        _array(q.packed), _dequantize_table(q.format), _array(q.scale), _array(q.location),
        q.block_size, _kind(out.dtype), _array(out), _threads(),
    )  # fmt: skip


def quantize_cuda(
    flat: Tensor, format: Format, block_size: int, tensor_scale: None = None
) -> tuple[Tensor, Tensor, None] | None:
    """(packed, absmax, None) of flat (n,), as the reference makes them; None if a value is not finite."""
    from nf4lab.kernels import cuda

    n, n_blocks = flat.numel(), -(-flat.numel() // block_size)
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=flat.device)
    scale = torch.empty(n_blocks, device=flat.device)
    codebook = _cuda_codebook(format, flat.device)
    try:
        cuda.quantize(flat.contiguous(), codebook, block_size=block_size, packed=packed, absmax=scale)
    except ValueError:  # its arguments are right: a value is not finite, which the caller describes
        return None
    return packed, scale, None


def dequantize_cuda(q, out: Tensor) -> None:
    """What the QuantizedTensor q stands for, into the contiguous tensor out, in one launch."""
    from nf4lab.kernels import cuda

    levels = _cuda_levels(q.format, 16, out.device)
    cuda.dequantize(q.packed, _cuda_absmax(q.stored_scale), levels, n=q.numel, block_size=q.block_size, out=out)


def gemv(x: Tensor, q, bias: Tensor | None) -> Tensor | None:
    """x W^T + bias without writing out W, the QuantizedTensor q of shape (n, k): x (..., k) to (..., n).

    None where the kernel does not serve: off a GPU, for more than 16 rows or none, for other formats and dtypes.
    """
    rows = math.prod(x.shape[:-1])
    if not (x.is_cuda and 1 <= rows <= GEMV_ROWS and q.numel):
        return None
    if choose(None, x.device, x.dtype, q.numel, q.format) != "cuda":
        return None
    from nf4lab.kernels import cuda

    levels = _cuda_levels(q.format, 16, x.device)
    constants = _cuda_absmax(q.stored_scale)
    return cuda.gemv(x.contiguous(), q.packed, constants, levels, shape=q.shape, block_size=q.block_size, bias=bias)


def _cuda_absmax(stored: Tensor | QuantizedConstants) -> Tensor | tuple:
    """Constants as the kernel takes them: decoded on the way where they are 8-bit, centred, in groups of 2**k."""
    if not isinstance(stored, QuantizedConstants):
        return stored
    scheme = stored.double_quant
    map = MAPS[scheme.map]
    if map.code_bits != 8 or stored.offset is None or scheme.group_size & (scheme.group_size - 1):
        return stored.dequantize()
    code_map = _cuda_levels(map, 256, stored.codes.device)
    return stored.codes, stored.group_absmax, stored.offset.reshape(1), code_map, scheme.group_size


@functools.lru_cache(maxsize=64)
def _cuda_codebook(format: Format, device: torch.device):
    """The format's boundaries, those that a shorter codebook lacks at infinity, and the 16 codes in their order."""
    from nf4lab.kernels import cuda

    used = format.ascending.tolist()
    unused = [code for code in range(16) if code not in used]
    return cuda.codebook(_padded(format.boundaries, 15, math.inf), (*used, *unused), device)


@functools.lru_cache(maxsize=64)
def _cuda_levels(format: Format, n: int, device: torch.device) -> Tensor:
    """The levels on the device, filled up to n: copied there once, since each copy would wait for the GPU."""
    return _padded(format.levels, n, 0.0).to(device)


def _padded(values: Tensor, n: int, filler: float) -> Tensor:
    return torch.nn.functional.pad(values, (0, n - values.numel()), value=filler)


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
    levels = _padded(format.levels[format.ascending], 16, 0.0)
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


QUANTIZE = {"cpu": quantize_cpu, "cuda": quantize_cuda}
DEQUANTIZE = {"cpu": dequantize_cpu, "cuda": dequantize_cuda}
