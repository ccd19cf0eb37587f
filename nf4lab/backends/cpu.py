"""The kernels for the CPU: tensors in, their memory as NumPy arrays to numba, tensors out."""

import ctypes
import functools
import mmap

import numpy as np
import torch
from torch import Tensor

from nf4lab.formats.double_quant import QuantizedConstants, decoded
from nf4lab.formats.format import Format, joined
from nf4lab.formats.normalizations import in_blocks
from nf4lab.formats.packing import packed_bytes

CHUNK = 2**13  # elements whose constants are made at once: torch shares out no operation on fewer than 2**15
HUGE_PAGES_FROM = 2**22  # bytes: two huge pages


def takes(format: Format) -> bool:
    """Whether the kernels serve a format: its codes have 4 bits, or fewer, which are packed anew."""
    return format.code_bits <= 4


def quantize(flat: Tensor, format: Format, block_size: int) -> tuple[Tensor, ...] | None:
    """(packed, scale, location, tensor_scale) of flat (n,), as `reference.quantize` makes them."""
    from nf4lab.kernels import cpu

    flat = flat.resolve_neg()
    n, n_blocks = flat.numel(), -(-flat.numel() // block_size)
    packed = empty((n + 1) // 2, torch.uint8, flat.device)
    made_by_kernel, tensor_scale = _normalization(format), None
    if made_by_kernel == cpu.GIVEN:
        stored, stored_location, scale, location, tensor_scale = _constants(flat, format, block_size)
    else:
        stored = scale = torch.empty(n_blocks, dtype=torch.float32, device=flat.device)
        stored_location = location = torch.empty_like(scale) if made_by_kernel == cpu.MIN_MAX else None
    finite = cpu.quantize(
        _array(flat), _kind(flat.dtype), _quantize_table(format), made_by_kernel, block_size,
        _array(scale), _array(location), _array(packed), _threads(),
    )  # fmt: skip
    if not finite:
        return None
    format.check_scale(stored)
    if format.code_bits < 4:
        packed = repack(packed, n, 4, format.code_bits, format.zero_code)
    return packed, stored, stored_location, tensor_scale


def encode_constants(constants: Tensor, offset: Tensor | None, map: Format, group_size: int) -> tuple[Tensor, Tensor]:
    """What `nf4lab.formats.double_quant.in_torch` returns, by a kernel."""
    from nf4lab.kernels import cpu

    n = constants.numel()
    codes, group_absmax = np.empty(n, np.uint8), np.empty(-(-n // group_size), np.float32)
    shift = np.float32(0 if offset is None else offset.item())
    cpu.encode_constants(constants.numpy(), shift, _map_table(map), group_size, codes, group_absmax)
    return torch.from_numpy(codes), torch.from_numpy(group_absmax)


def dequantize(
    packed: Tensor,
    scale: Tensor | QuantizedConstants,
    location: Tensor | QuantizedConstants | None,
    tensor_scale: Tensor | None,
    format: Format,
    block_size: int,
    out: Tensor,
) -> None:
    """What the parts of a QuantizedTensor stand for, into the contiguous tensor out."""
    from nf4lab.kernels import cpu

    if format.code_bits < 4:
        packed = repack(packed, out.numel(), format.code_bits, 4)
    torch.autograd.graph.increment_version(out)  # autograd can't see that NumPy writes to it
    cpu.dequantize(
        _array(packed), _dequantize_table(format), _array(decoded(scale, tensor_scale)), _array(decoded(location)),
        block_size, _kind(out.dtype), _array(out), _threads(),
    )  # fmt: skip


def prepare(packed: Tensor, scale, location, format: Format, block_size: int, dtype: torch.dtype):
    """fill(out) as `nf4lab.backends.prepare` describes it; None where a part has to be decoded or packed anew first."""
    parts = [part for part in (packed, scale, location) if part is not None]
    if format.code_bits < 4 or not all(isinstance(part, Tensor) and part.is_contiguous() for part in parts):
        return None
    from nf4lab.kernels import cpu

    packed, scale, location = (_array(None) if part is None else _borrowed(part) for part in (packed, scale, location))
    pairs, kind = _dequantize_table(format), _kind(dtype)

    def fill(out: Tensor) -> None:
        cpu.dequantize(packed, pairs, scale, location, block_size, kind, _array(out), _threads())

    return fill


def repack(packed: Tensor, n: int, bits: int, wanted: int, pad: int = 0) -> Tensor:
    """The n codes of packed bytes in another width: uint8 (ceil(n * wanted / 8),), the last completed with `pad`."""
    from nf4lab.kernels import cpu

    out = empty(packed_bytes(n, wanted), torch.uint8, packed.device)
    cpu.repack(_array(packed), n, bits, wanted, pad, out.numpy(), _threads())
    return out


def pack(codes: Tensor, pad: int, bits: int) -> Tensor:
    """What `nf4lab.formats.packing.pack_checked` returns, by a kernel."""
    return repack(codes, codes.numel(), 8, bits, pad)


def _borrowed(tensor: Tensor) -> np.ndarray:
    """The memory of a contiguous tensor as an array that does not keep it alive."""
    if not tensor.numel():
        return _array(tensor)
    memory = (ctypes.c_byte * tensor.nbytes).from_address(tensor.data_ptr())
    return np.frombuffer(memory, dtype=_array(tensor[:0]).dtype)


def _normalization(format: Format) -> int:
    """Which constants the kernel makes itself: those of float32 absmax and min-max. Others are given to it."""
    from nf4lab.kernels import cpu

    if format.constants_dtype != torch.float32:
        return cpu.GIVEN
    if format.scale_is_absmax:
        return cpu.ABSMAX
    whole_range = format.normalization.depends_on == "range" and format.normalization.has_location
    return cpu.MIN_MAX if whole_range and format.extreme == 1 and not format.search else cpu.GIVEN


def _constants(flat: Tensor, format: Format, block_size: int) -> tuple[Tensor | None, ...]:
    """The four of `Format.constants` that a kernel does not make, by the format's own functions, and tensor_scale.

    Where a rule depends on a block's extreme alone, a kernel finds that, and the rule is given blocks of one element.
    """
    from nf4lab.kernels import cpu

    values = flat
    if format.normalization.depends_on == "magnitude":
        values = torch.empty(-(-flat.numel() // block_size), dtype=torch.float32, device=flat.device)
        cpu.extremes(_array(flat), _kind(flat.dtype), block_size, _array(values), _threads())
    tensor_scale = format.scale_of_tensor(values)
    of_extremes = values is not flat and not format.search
    values, width = (values, 1) if of_extremes else (flat, block_size)
    by_kernel = functools.partial(search, format=format, block_size=block_size)

    def run(first: int, last: int) -> list[tuple]:
        chunks = values[first * CHUNK : last * CHUNK].split(CHUNK)
        parts = [part for chunk in chunks for part in in_blocks(chunk, width)]
        return [format.constants(part.float(), tensor_scale, by_kernel) for part in parts]

    runs = cpu.in_threads(run, -(-values.numel() // CHUNK), _threads())
    return *joined([part for run in runs for part in run]), tensor_scale


def search(blocks: Tensor, trials: Tensor, location: Tensor | None, *, format: Format, block_size: int) -> Tensor:
    """What `Format.least_squares` returns, by a kernel."""
    from nf4lab.kernels import cpu

    best = torch.empty(len(blocks), dtype=torch.int64, device=blocks.device)
    levels = torch.nn.functional.pad(format.levels[format.ascending], (0, 16 - len(format.levels)))
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
def _map_table(map: Format):
    from nf4lab.kernels import cpu

    return cpu.map_table(map.boundaries.numpy(), map.ascending.numpy())


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
    bits = tensor.view(torch.uint16) if tensor.itemsize == 2 else tensor
    return bits.numpy().ravel()


def _threads() -> int:
    """As many as torch uses, so that torch.set_num_threads and OMP_NUM_THREADS hold, and NUMBA_NUM_THREADS too."""
    import numba

    return min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)


def empty(shape: int | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor. A large one on the CPU asks Linux for pages of 2 MiB.

    Memory fresh from the system is handed out and cleared page by page, when it is first written; in pages of 4 KiB
    that takes several times as long as writing it.
    """
    tensor = torch.empty(shape, dtype=dtype, device=device)
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
