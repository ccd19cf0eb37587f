"""Double quantization: the constants of a quantized tensor quantized too.

One float32 per block of 64 costs half a bit per weight. Here the constants lose their mean, are taken in groups of 256,
and each group is coded by the same machinery as weights: absmax, then the nearest level of a map.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nf4lab import codebooks
from nf4lab.formats.format import Format
from nf4lab.formats.normalizations import normalized
from nf4lab.formats.packing import pack_checked, unpack

# What torch works on in one thread: it shares out no operation on fewer elements than 2**15.
UNSHARED = 2**15 - 1
MAPS = {
    row.name: row
    for row in [
        Format("dynamic8", codebooks.dynamic_map()),  # bitsandbytes'
        Format("linear8", codebooks.symmetric_int(8)),  # torchao's idea: evenly spaced
        Format("linear4", codebooks.symmetric_int(4)),
    ]
}


@dataclass(frozen=True)
class DoubleQuant:
    """How constants are quantized: a map from MAPS, whether their mean is taken off first, and the group size.

    The default is bitsandbytes': the signed 8-bit dynamic map, centred, one float32 for each group of 256. QLoRA
    (arXiv:2305.14314, section 3) describes it so too, but says "8-bit floats" and names no map.

    One machine gives the same bytes with any number of threads. On a GPU, or a CPU with other vector instructions, the
    mean is added up in another order, and its last bit may differ; then a few codes are the next ones (see `mean`).

    Raises ValueError for an unknown map or a group size below 1.
    """

    map: str = "dynamic8"
    centred: bool = True
    group_size: int = 256

    def __post_init__(self):
        if self.map not in MAPS:
            raise ValueError(f"unknown map {self.map!r} for double quantization; known are {', '.join(MAPS)}")
        if not isinstance(self.group_size, int) or self.group_size < 1:
            raise ValueError(f"group_size must be a positive integer; got {self.group_size!r}")

    def quantize(self, constants: Tensor, encode: Callable | None = None) -> "QuantizedConstants":
        """Constants, float32 (n,), to codes and one float32 per group, with a float32 offset if centred.

        encode: what does the work of `in_torch`, for a backend that has something faster.
        """
        n, map = constants.numel(), MAPS[self.map]
        offset = mean(constants) if self.centred and n else None
        codes, group_absmax = (encode or in_torch)(constants, offset, map, self.group_size)
        return QuantizedConstants(pack_checked(codes, 0, map.code_bits), group_absmax, offset, n, self)

    def piece(self, n: int, device: torch.device) -> int:
        """How many of n constants to decode at once: on a CPU whole groups that torch does not share out to threads.

        It would wait for them after each of a dozen short operations, on busy cores for a time slice of another's.
        """
        groups = max(1, UNSHARED // self.group_size)
        return groups * self.group_size if in_pieces(device) else max(1, n)


def in_torch(constants: Tensor, offset: Tensor | None, map: Format, group_size: int) -> tuple[Tensor, Tensor]:
    """(codes, uint8 (n,), absmax of the groups, float32 (n_groups,)) of constants, float32 (n,), less their offset."""
    centred = constants if offset is None else constants - offset
    return map.encode(normalized(centred, group_size, map.normalize))[:2]


def put_together(parts: Sequence[Tensor]) -> Tensor:
    """Tensors (n_i,) as one, copied one by one: torch would share a concatenation out to threads."""
    if len(parts) == 1:
        return parts[0]
    whole = parts[0].new_empty(sum(map(len, parts)))
    for place, part in zip(whole.split([*map(len, parts)]), parts, strict=True):
        place.copy_(part)
    return whole


def in_pieces(device: torch.device) -> bool:
    """Whether constants there are worked on piece by piece: on a CPU, where torch.compile is not to see a long loop."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


def mean(constants: Tensor) -> Tensor:
    """The mean of float32 (n,) constants: on a CPU the same bits with any number of threads.

    Pieces that torch adds up in one thread, then their sums. Up to 2**15 - 1 constants this is torch's mean, which
    with more depends on the number of threads. On a GPU it is torch's there.
    """
    n = constants.numel()
    if n <= UNSHARED or not in_pieces(constants.device):
        return constants.mean()
    return torch.stack([piece.sum() for piece in constants.split(UNSHARED)]).sum() / n


def as_double_quant(double_quant: "bool | str | DoubleQuant") -> DoubleQuant | None:
    """What the argument `double_quant` of `nf4lab.quantize` asks for: None, the default, a map's name, or its own."""
    if isinstance(double_quant, DoubleQuant):
        return double_quant
    if isinstance(double_quant, bool):
        return DoubleQuant() if double_quant else None
    if isinstance(double_quant, str):
        return DoubleQuant(double_quant)
    raise TypeError(
        f"double_quant must be a bool, a map's name or a nf4lab.DoubleQuant; got {type(double_quant).__name__}"
    )


@dataclass(frozen=True, eq=False)
class QuantizedConstants:
    """Quantized constants: what is stored of them, and how to get them back.

    codes: uint8, n of them packed: a byte each for an 8-bit map, two to a byte for a 4-bit one.
    group_absmax: float32 (n_groups,). offset: float32 scalar, or None where the constants were not centred.
    n: how many constants.
    """

    codes: Tensor
    group_absmax: Tensor
    offset: Tensor | None
    n: int
    double_quant: DoubleQuant

    def dequantize(self) -> Tensor:
        """The constants, float32 (n,): map[code] * group_absmax, then + offset, each rounded to float32."""
        scheme, map = self.double_quant, MAPS[self.double_quant.map]
        piece = scheme.piece(self.n, self.codes.device)
        codes = unpack(self.codes, self.n, map.code_bits).split(piece)
        of_groups = self.group_absmax.split(-(-piece // scheme.group_size))
        pairs = zip(codes, of_groups, strict=True)
        parts = [map.decode_flat(codes, scheme.group_size, absmax, None) for codes, absmax in pairs]
        return put_together(parts if self.offset is None else [part.add_(self.offset) for part in parts])

    def at(self, positions: Tensor) -> Tensor:
        """The constants at these positions alone: int64 (m,) to float32 (m,), to the bit as `dequantize` has them."""
        scheme, map = self.double_quant, MAPS[self.double_quant.map]
        codes = self.codes if map.code_bits == 8 else unpack(self.codes, self.n, map.code_bits)
        constants = map.decode(codes[positions][:, None], self.group_absmax[positions // scheme.group_size], None)[:, 0]
        return constants if self.offset is None else constants + self.offset

    def numel(self) -> int:
        """How many constants they are, asked as of a tensor."""
        return self.n

    @property
    def nbytes(self) -> int:
        """Bytes actually stored: codes, group absmax, and the offset where there is one."""
        return self.codes.nbytes + self.group_absmax.nbytes + (0 if self.offset is None else self.offset.nbytes)

    def to(self, device: torch.device | str) -> "QuantizedConstants":
        """The same constants on another device."""
        offset = None if self.offset is None else self.offset.to(device)
        return QuantizedConstants(
            self.codes.to(device), self.group_absmax.to(device), offset, self.n, self.double_quant
        )


def decoded(constants: Tensor | QuantizedConstants | None, tensor_scale: Tensor | None = None) -> Tensor | None:
    """Constants as they decode, float32 (n,), from what is stored of them; None for none."""
    values = constants.dequantize() if isinstance(constants, QuantizedConstants) else constants
    return values if tensor_scale is None else values * tensor_scale
