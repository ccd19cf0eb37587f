"""A format: how a block is normalised, which levels it is rounded to, how its constants are stored.

Every format here decodes by one formula, x_hat = location + scale * levels[code], with one scale a block and, where
the normalisation has one, a location. NF4 is a row of the table at the bottom.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nf4lab import codebooks

# blocks, float32 (n_blocks, block_size) -> scale (n_blocks,) and location (n_blocks,), or None where it is zero
Normalization = Callable[[Tensor], tuple[Tensor, Tensor | None]]


def absmax(blocks: Tensor) -> tuple[Tensor, None]:
    """Scale a block by its largest magnitude, so that it lies in -1..1 and zero stays zero."""
    return blocks.abs().amax(dim=1), None


def min_max(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Shift and scale a block so that its least value becomes 0 and its greatest 1: two constants.

    Of 0.0 and -0.0 either may come out as the extreme; adding 0.0 makes both 0.0, so that every backend agrees.
    """
    location = blocks.amin(dim=1) + 0.0
    return (blocks.amax(dim=1) + 0.0) - location, location


def mean_std(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Shift a block by its mean and scale it by its standard deviation (the one that divides by n): two constants."""
    std, mean = torch.std_mean(blocks.double(), dim=1, correction=0)
    return std.float(), mean.float()


@dataclass(frozen=True, eq=False)
class Format:
    """Up to 256 levels and the rule that brings a block to them.

    name: what errors and tables call it.
    levels: float32 (n_levels,) by code, in any order; a sequence is converted. 16 or fewer make a 4-bit format.
    normalize: `absmax`, `min_max`, `mean_std`, or a function of one's own from blocks to (scale, location).
    constants_dtype: the floating-point type that scale and location are rounded to before they are used.

    Raises ValueError where the levels are not one-dimensional, finite and 2 to 256 in number.
    """

    name: str
    levels: Tensor
    normalize: Normalization = absmax
    constants_dtype: torch.dtype = torch.float32

    def __post_init__(self):
        levels = torch.as_tensor(self.levels, dtype=torch.float32)
        if levels.dim() != 1 or not 2 <= levels.numel() <= 256 or not levels.isfinite().all():
            raise ValueError(f"levels must be 2 to 256 finite numbers in one dimension; got {self.levels}")
        if not self.constants_dtype.is_floating_point:
            raise ValueError(f"constants are stored in a floating-point dtype; got {self.constants_dtype}")
        object.__setattr__(self, "levels", levels)

    @property
    def code_bits(self) -> int:
        """Bits a code takes where it is stored: 4, or 8 for more than 16 levels."""
        return 4 if self.levels.numel() <= 16 else 8

    @cached_property
    def ascending(self) -> Tensor:
        """The codes in ascending order of their levels: int64 (n_levels,); equal levels keep the order of codes."""
        return self.levels.argsort(stable=True)

    @cached_property
    def boundaries(self) -> Tensor:
        """The midpoints of neighbouring levels, ascending: float32 (n_levels - 1,)."""
        levels = self.levels[self.ascending]
        return (levels[:-1] + levels[1:]) / 2

    @cached_property
    def zero_code(self) -> int:
        """The code that a normalised 0.0 is rounded to; it fills the nibble that an odd length leaves over."""
        return self.nearest(torch.zeros(1)).item()

    def nearest(self, normalized: Tensor) -> Tensor:
        """The code of the nearest level, element by element: float32 to uint8. A tie goes to the lower level."""
        rank = torch.bucketize(normalized, self.boundaries.to(normalized.device), out_int32=True)
        return self.ascending.to(normalized.device, torch.uint8)[rank]

    def encode(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes and constants of blocks: float32 (n_blocks, block_size) to (codes, scale, location).

        codes: uint8 (n_blocks, block_size). scale: float32 (n_blocks,). location: the same, or None.
        A block is multiplied by the float32 reciprocal of its scale, as bitsandbytes does. Where the scale is zero
        or so small that the reciprocal is infinite, it is divided instead, and 0/0 counts as 0.
        """
        scale, location = self.normalize(blocks)
        scale = self.as_stored(scale)
        location = None if location is None else self.as_stored(location)
        centred = blocks if location is None else blocks - location[:, None]
        reciprocal = 1 / scale
        normalized = centred * reciprocal[:, None]
        tiny = reciprocal.isinf()
        if tiny.any():
            normalized[tiny] = (centred[tiny] / scale[tiny, None]).nan_to_num(nan=0.0)
        return self.nearest(normalized), scale, location

    def decode(self, codes: Tensor, scale: Tensor, location: Tensor | None) -> Tensor:
        """The values that codes stand for: uint8 (n_blocks, block_size) to float32 of the same shape."""
        values = self.levels.to(codes.device)[codes.int()] * scale[:, None]
        return values if location is None else values + location[:, None]

    def as_stored(self, constants: Tensor) -> Tensor:
        """Float32 constants, rounded to what `constants_dtype` holds."""
        return constants.to(self.constants_dtype).float()


FORMATS = {
    row.name: row
    for row in [
        Format("nf4", codebooks.nf4()),
        Format("fp4", codebooks.fp4()),
        Format("int4", codebooks.symmetric_int(4)),
        Format("uniform", codebooks.uniform(16), min_max),
        Format("naive-quantile", codebooks.quantile_midpoints(16), mean_std),
    ]
}


def as_format(format: str | Format) -> Format:
    """The format of that name, or the format given.

    Raises ValueError for an unknown name, with the nearest known ones, TypeError for anything else.
    """
    if isinstance(format, Format):
        return format
    if not isinstance(format, str):
        raise TypeError(f"format must be a name or a nf4lab.Format; got {type(format).__name__}")
    if format not in FORMATS:
        near = difflib.get_close_matches(format.lower(), FORMATS, n=3, cutoff=0.4) or list(FORMATS)
        raise ValueError(f"unknown format {format!r}; did you mean {' or '.join(map(repr, near))}?")
    return FORMATS[format]
