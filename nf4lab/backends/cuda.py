"""The kernels for NVIDIA GPUs: what they take, made ready once for a format and a device."""

import functools
import math

import torch
from torch import Tensor

from nf4lab.formats.double_quant import MAPS, QuantizedConstants
from nf4lab.formats.format import Format


def takes(format: Format) -> bool:
    """Whether the kernels serve a format: 4-bit codes, scaled by a float32 absmax."""
    scaled = format.scale_is_absmax and format.constants_dtype == torch.float32
    return format.code_bits == 4 and scaled and not format.signed_zero


def missing() -> str | None:
    """None where the kernels can run, or in one sentence why not."""
    from nf4lab.kernels import cuda

    return cuda.available()


def quantize(flat: Tensor, format: Format, block_size: int) -> tuple[Tensor, Tensor, None, None] | None:
    """(packed, absmax, None, None) of flat (n,), as `reference.quantize` makes them."""
    from nf4lab.kernels import cuda

    n, n_blocks = flat.numel(), -(-flat.numel() // block_size)
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=flat.device)
    scale = torch.empty(n_blocks, dtype=torch.float32, device=flat.device)
    codebook = _codebook(format, flat.device)
    try:
        cuda.quantize(flat.contiguous(), codebook, block_size=block_size, packed=packed, absmax=scale)
    except ValueError:  # its arguments are right: a value is not finite, which the caller describes
        return None
    return packed, scale, None, None


def dequantize(
    packed: Tensor, scale: Tensor | QuantizedConstants, location: None, tensor_scale: None,
    format: Format, block_size: int, out: Tensor,
) -> None:  # fmt: skip
    """What the parts of a QuantizedTensor stand for, into the contiguous tensor out, in one launch."""
    from nf4lab.kernels import cuda

    levels = levels_on(format, 16, out.device)
    cuda.dequantize(packed, constants(scale), levels, n=out.numel(), block_size=block_size, out=out)


def prepare(packed, stored_scale, format: Format, shape: tuple[int, int], block_size: int, dtype: torch.dtype):
    """See `nf4lab.backends.prepare`. Constants that the kernels do not decode on their way can't be made ready."""
    from nf4lab.kernels import cuda

    if isinstance(stored_scale, QuantizedConstants) and not _decoded_on_the_way(stored_scale):
        return None, None
    n, k = shape
    parts = packed, constants(stored_scale), levels_on(format, 16, packed.device)
    fill = cuda.prepare_dequantize(*parts, n=n * k, block_size=block_size, dtype=dtype)
    gemv = cuda.prepare_gemv(*parts, shape=shape, block_size=block_size, dtype=dtype) if n * k else None
    return gemv, fill


def constants(stored: Tensor | QuantizedConstants) -> Tensor | tuple:
    """Constants as the kernel takes them: decoded on the way where they are 8-bit, centred, in groups of 2**k."""
    if not isinstance(stored, QuantizedConstants):
        return stored
    if not _decoded_on_the_way(stored):
        return stored.dequantize()
    scheme = stored.double_quant
    code_map = levels_on(MAPS[scheme.map], 256, stored.codes.device)
    return stored.codes, stored.group_absmax, stored.offset.reshape(1), code_map, scheme.group_size


def _decoded_on_the_way(stored: QuantizedConstants) -> bool:
    size = stored.double_quant.group_size
    return MAPS[stored.double_quant.map].code_bits == 8 and stored.offset is not None and not size & (size - 1)


@functools.lru_cache(maxsize=64)
def _codebook(format: Format, device: torch.device):
    """The format's boundaries, those that a shorter codebook lacks at infinity, and the 16 codes in their order."""
    from nf4lab.kernels import cuda

    used = format.ascending.tolist()
    unused = [code for code in range(16) if code not in used]
    return cuda.codebook(_padded(format.boundaries, 15, math.inf), (*used, *unused), device)


@functools.lru_cache(maxsize=64)
def levels_on(format: Format, n: int, device: torch.device) -> Tensor:
    """The levels on the device, filled up to n: copied there once, since each copy would wait for the GPU."""
    return _padded(format.levels, n, 0.0).to(device)


def _padded(values: Tensor, n: int, filler: float) -> Tensor:
    return torch.nn.functional.pad(values, (0, n - values.numel()), value=filler)
