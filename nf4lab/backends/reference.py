"""The reference, in plain torch, on any device, and when a kernel takes its place; all give the same bytes.

It works in chunks, so that a large tensor needs no large helpers. Kernels are imported when first used: importing
nf4lab compiles nothing and does not load numba.
"""

import torch
from torch import Tensor

from nf4lab.backends import cpu, cuda
from nf4lab.formats.double_quant import QuantizedConstants, decoded
from nf4lab.formats.format import Format
from nf4lab.formats.normalizations import normalized
from nf4lab.formats.packing import pack_checked, packed_bytes, unpack

CHUNK = 2**20  # elements handled at once, at most; a multiple of every block size
BACKENDS = ("torch", "cpu", "cuda")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The kernels win at every size once they are loaded (benchmarks/cpu.py). Below this many elements the reference takes
# about a millisecond, and is not worth the second that importing numba takes, or a first compilation.
CPU_FROM = 2**16


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
    if backend == "cpu" and not cpu.takes(format):
        raise ValueError(f"backend 'cpu' takes codes of up to 4 bits; those of {format.name!r} have {format.code_bits}")
    if backend == "cuda" and format.code_bits != 4:
        raise ValueError(f"backend 'cuda' takes codes of 4 bits; those of {format.name!r} have {format.code_bits}")
    if backend == "cuda" and not cuda.takes(format):
        raise ValueError(f"backend 'cuda' takes formats scaled by a float32 absmax; got {format.name!r}")
    if backend == "cuda" and (missing := cuda.missing()):
        raise RuntimeError(f"backend 'cuda' cannot run: {missing}")
    return backend


def _fastest(device: torch.device, dtype: torch.dtype, n: int, format: Format) -> str:
    if dtype not in KERNEL_DTYPES or torch.compiler.is_compiling():  # torch.compile sees into the reference only
        return "torch"
    if device.type == "cpu" and n >= CPU_FROM and cpu.takes(format):
        return "cpu"
    return "cuda" if device.type == "cuda" and cuda.takes(format) and not cuda.missing() else "torch"


def quantize(flat: Tensor, format: Format, block_size: int) -> tuple[Tensor, ...] | None:
    """(packed, scale, location, tensor_scale) of flat (n,), as a QuantizedTensor stores them.

    None where a value is not finite in float32.
    """
    tensor_scale = format.scale_of_tensor(flat) if format.tensor_scale else None
    packed, constants, at = flat.new_empty(-(-flat.numel() * format.code_bits // 8), dtype=torch.uint8), [], 0
    for start, stop in chunks(flat.numel()):
        values = flat[start:stop].float()
        if not values.isfinite().all():
            return None
        codes, scale, location = format.encode(normalized(values, block_size, format.normalize), tensor_scale)
        piece = pack_checked(codes, format.zero_code, format.code_bits)
        packed[at : at + len(piece)], at = piece, at + len(piece)
        constants.append((scale, location))
    scales, locations = zip(*constants, strict=True)
    return packed, torch.cat(scales), None if location is None else torch.cat(locations), tensor_scale


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
    scale, location, flat, bits = decoded(scale, tensor_scale), decoded(location), out.reshape(-1), format.code_bits
    for start, stop in chunks(flat.numel()):
        codes = unpack(packed[start * bits // 8 : packed_bytes(stop, bits)], stop - start, bits)
        blocks = slice(start // block_size, -(-stop // block_size))
        shift = None if location is None else location[blocks]
        flat[start:stop] = format.decode_flat(codes, block_size, scale[blocks], shift)


def chunks(n: int) -> list[tuple[int, int]]:
    """(start, stop) over n elements: runs of whole blocks of any size, but for the last block, which may be short.

    A run is a sixteenth of the whole, within limits: its float32 helpers, five or so, stay smaller than the tensor.
    """
    run = min(max(n // 16 // 4096 * 4096, 2**16), CHUNK)
    return [(start, min(start + run, n)) for start in range(0, n, run)]
