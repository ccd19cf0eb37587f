"""The reference, in plain torch, on any device: in chunks, so that a large tensor needs no large helpers."""

import torch
from torch import Tensor

from nf4lab.formats.double_quant import QuantizedConstants, decoded
from nf4lab.formats.format import Format
from nf4lab.formats.packing import pack_checked, packed_bytes, unpack

CHUNK = 2**20  # elements handled at once, at most; a multiple of every block size


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
        codes, scale, location = format.encode_flat(values, block_size, tensor_scale)
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
