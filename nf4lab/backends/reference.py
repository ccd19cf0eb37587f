"""The reference, in plain torch, on any device: in chunks, so that a large tensor needs no large helpers."""

from collections.abc import Iterator

import torch
from torch import Tensor

from nf4lab.formats.format import Format
from nf4lab.formats.packing import pack, unpack

CHUNK = 2**20  # elements handled at once, at most; a multiple of every block size


def quantize(
    flat: Tensor, format: Format, block_size: int, tensor_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """(packed, scale, location) of flat (n,), chunk by chunk; None if a value is not finite in float32."""
    packed = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8, device=flat.device)
    constants = []
    for start, stop, width in chunks(flat.numel(), block_size):
        values = flat[start:stop].float()
        if not values.isfinite().all():
            return None
        codes, *scale_and_location = format.encode(values.reshape(-1, width), tensor_scale)
        packed[start // 2 : (stop + 1) // 2] = pack(codes.reshape(-1), pad=format.zero_code)
        constants.append(scale_and_location)
    scale, location = (None if None in parts else torch.cat(parts) for parts in zip(*constants, strict=True))
    return packed, scale, location


def dequantize(q, out: Tensor) -> None:
    """What the QuantizedTensor q stands for, into the contiguous tensor out, chunk by chunk."""
    scale, location, flat = q.scale, q.location, out.reshape(-1)
    for start, stop, width in chunks(q.numel, q.block_size):
        codes = unpack(q.packed[start // 2 : (stop + 1) // 2], stop - start).reshape(-1, width)
        blocks = slice(start // q.block_size, -(-stop // q.block_size))
        values = q.format.decode(codes, scale[blocks], None if location is None else location[blocks])
        flat[start:stop] = values.reshape(-1)


def chunks(n: int, block_size: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, block width) over n elements: runs of whole blocks, then the short last block alone.

    A run is a sixteenth of the whole, within limits: its float32 helpers, five or so, stay smaller than the tensor.
    """
    whole = n - n % block_size
    run = min(max(n // 16 // 4096 * 4096, 2**16), CHUNK)
    for start in range(0, whole, run):
        yield start, min(start + run, whole), block_size
    if whole < n:
        yield whole, n, n - whole
