"""A format: how a block is normalised, which levels it is rounded to, how its constants are stored.

Every format here decodes by one formula, x_hat = location + scale * levels[code], with one scale per block and, where
the normalisation has one, a location. NF4 is a row of `nf4lab.FORMATS`.
"""

from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nf4lab.formats.normalizations import Normalization, Normalized, Rule, absmax, normalization_of
from nf4lab.formats.packing import WIDTHS, or_

LEAST = 2.0**-149  # the smallest positive float32
TIES = ("down", "up", "even")
# Half-way from 448, the greatest E4M3, to the 480 that would follow. torch would store 448 for anything above it.
E4M3_OVERFLOW = 464.0
# What a searched scale is tried at, as factors of the unsearched one; that one first, since it wins ties.
SEARCH = (1.0, *(k / 32 for k in range(19, 52) if k != 32))


class _Levels:
    """A format's levels, copied when they are given and whenever they are asked for: nobody outside can change them."""

    def __get__(self, format, owner=None) -> Tensor:
        if format is None:
            raise AttributeError("levels")  # so that a Format without levels is refused
        return format._levels.clone()

    def __set__(self, format, levels) -> None:
        given = levels.detach() if isinstance(levels, Tensor) else levels
        format.__dict__["_levels"] = torch.asarray(given, dtype=torch.float32, device="cpu", copy=True)


class Tables(NamedTuple):
    """What a format looks up, on one device: levels by code, boundaries, and the codes (uint8) in ascending order."""

    levels: Tensor
    boundaries: Tensor
    ascending: Tensor


@dataclass(frozen=True, eq=False)
class Format:
    """Up to 256 levels and the rule that brings a block to them. Formats are equal if all their parts are.

    name: what errors and tables call it.
    levels: float32 (n_levels,) by code, in any order; a sequence is converted, and always copied.
    normalize: `absmax`, `signed_absmax`, `power_of_two`, `min_max`, `mean_std`, or a function of one's own from blocks
    to (scale, location).
    constants_dtype: the floating-point type that scale and location are rounded to before they are used: to nearest,
    ties to even; E8M0, which has powers of two only, to the nearest, of two as near to the greater. Half the least
    positive number and less become zero, or that number in E8M0, which has no zero.
    extreme: the level that the normalisation brings a block's extreme to; the scale is divided by it. 1 for most;
    6 for E2M1 in its own units, -8 for Q4_0.
    tensor_scale: whether scales are stored as multiples of one float32 per tensor, made so that the greatest that can
    occur is the greatest of constants_dtype: absmax of the tensor / (|extreme| * that greatest).
    block_size: what `nf4lab.quantize` takes unless told otherwise.
    ties: where a value half-way between two levels goes: "down", "up", or to the "even" one of two codes.
    exact_codes: whether codes are made with constants as they were before rounding, as llama.cpp does.
    search: factors of the normalised scale; each block takes the one of least squared error. See `searched`.
    stored_bits: bits that a code is stored in, 2, 3, 4 or 8; by default the fewest that name all levels. What it came
    to is `code_bits`.

    Raises ValueError where the levels are not one-dimensional, finite and 2 to 256 in number, or the parts disagree.
    """

    name: str
    levels: Tensor = _Levels()
    normalize: Rule = absmax
    constants_dtype: torch.dtype = torch.float32
    extreme: float = 1.0
    tensor_scale: bool = False
    block_size: int = 64
    ties: str = "down"
    exact_codes: bool = False
    search: tuple[float, ...] = ()
    stored_bits: int | None = None

    def __post_init__(self):
        levels = self._levels
        if levels.dim() != 1 or not 2 <= levels.numel() <= 256 or not levels.isfinite().all():
            raise ValueError(f"levels must be 2 to 256 finite numbers in one dimension; got {levels}")
        enough = [bits for bits in WIDTHS if 2**bits >= len(levels)]
        if self.stored_bits not in (None, *enough):
            names = or_(2**bits for bits in WIDTHS)
            raise ValueError(f"codes of {or_(WIDTHS)} bits name {names} levels; got stored_bits "
                             f"{self.stored_bits!r} for {len(levels)} levels")  # fmt: skip
        if not self.constants_dtype.is_floating_point:
            raise ValueError(f"constants are stored in a floating-point dtype; got {self.constants_dtype}")
        if self.constants_dtype == torch.float8_e8m0fnu and self.normalization.has_sign:
            raise ValueError(f"torch.float8_e8m0fnu has no negative numbers, which {self.normalization.name} stores")
        if self.ties not in TIES:
            raise ValueError(f"ties go 'down', 'up' or to 'even'; got {self.ties!r}")
        if not self.extreme:
            raise ValueError(f"extreme must not be zero: the scale is divided by it; got {self.extreme}")
        if self.exact_codes and self.search:
            raise ValueError("a searched scale is judged as it is stored; exact_codes must be False with it")
        if self.stored_bits == enough[0]:
            object.__setattr__(self, "stored_bits", None)  # the same format as without saying it
        object.__setattr__(self, "code_bits", self.stored_bits or enough[0])

    @cached_property
    def _value(self) -> tuple:
        """What makes two formats equal: levels by their bits, since -0.0 is not 0.0 here."""
        rest = (getattr(self, field.name) for field in fields(self) if field.name != "levels")
        return (self._levels.numpy().tobytes(), *rest)

    def __eq__(self, other: object) -> bool:
        return self._value == other._value if isinstance(other, Format) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._value)

    def __getstate__(self) -> dict:
        """The parts and nothing that is derived from them, for copies and other processes."""
        derived = ("_value", "normalization", "_on_cpu", "signed_zero", "zero_code")
        return {name: part for name, part in self.__dict__.items() if name not in derived}

    def searched(self, factors: tuple[float, ...] = SEARCH) -> "Format":
        """This format with a searched scale: of `factors` times the normalised scale, the one of least squared error.

        The candidates are rounded as they will be stored, then judged. The bits are the same, and so is the decoder.
        """
        return replace(self, name=f"{self.name} searched", search=tuple(factors), exact_codes=False)

    @cached_property
    def normalization(self) -> Normalization:
        """What is known of `normalize`."""
        return normalization_of(self.normalize)

    @property
    def scale_is_absmax(self) -> bool:
        """Whether a block's scale is its largest magnitude, to the bit, up to the rounding of constants_dtype."""
        return self.normalize is absmax and self.extreme == 1 and not self.tensor_scale and not self.search

    @property
    def boundaries(self) -> Tensor:
        """What a value must exceed to be given the next level: float32 (n_levels - 1,), ascending.

        The midpoints of neighbouring levels; where a tie goes up, the next float32 below the midpoint.
        """
        return self._on_cpu.boundaries.clone()

    @property
    def ascending(self) -> Tensor:
        """The codes in ascending order of their levels: int64 (n_levels,); equal levels keep the order of codes.

        -0.0 stands before 0.0.
        """
        return self._on_cpu.ascending.long()

    @cached_property
    def _on_cpu(self) -> Tables:
        negative_first = self._levels.signbit().logical_not().int().argsort(stable=True)
        ascending = negative_first[self._levels[negative_first].argsort(stable=True)]
        levels = self._levels[ascending]
        midpoints = (levels[:-1] + levels[1:]) / 2
        goes_up = {"down": False, "up": True, "even": ascending[1:] % 2 == 0}[self.ties]
        below = midpoints.nextafter(torch.full_like(midpoints, -torch.inf))
        boundaries = torch.where(torch.as_tensor(goes_up, device="cpu"), below, midpoints)
        return Tables(self._levels, boundaries, ascending.to(torch.uint8))

    def tables(self, device: torch.device) -> Tables:
        """Levels, boundaries and codes on a device, not to be changed: copied once, since a copy waits for the GPU."""
        return self._on_cpu if device.type == "cpu" else _tables_on(self, device)

    @cached_property
    def signed_zero(self) -> bool:
        """Whether one of the levels is -0.0, so that the sign of a zero is kept."""
        return bool(((self._levels == 0) & self._levels.signbit()).any())

    @cached_property
    def zero_code(self) -> int:
        """The code that a normalised 0.0 is rounded to; it fills what the last byte of packed codes has left over."""
        return self.nearest(torch.zeros(1, dtype=torch.float32, device="cpu")).item()

    def nearest(self, normalized: Tensor) -> Tensor:
        """The code of the nearest level, element by element: float32 to uint8. Ties go where `ties` says."""
        if self.signed_zero:  # no comparison tells -0.0 from 0.0, so it takes the place of the number below zero
            normalized = torch.where((normalized == 0) & normalized.signbit(), -LEAST, normalized)
        tables = self.tables(normalized.device)
        return tables.ascending[torch.bucketize(normalized, tables.boundaries, out_int32=True)]

    def encode(
        self, parts: list[Normalized], tensor_scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(codes, scale, location) of n values, given as `normalized(values, block_size, self.normalize)`.

        codes: uint8 (n,). scale: float32 (n_blocks,), as stored. location: the same, or None.
        tensor_scale: float32 (), from `scale_of_tensor`, for formats that have one.
        A block is multiplied by the float32 reciprocal of its scale, as bitsandbytes does. Where the scale is zero
        or so small that the reciprocal is infinite, it is divided instead, and 0/0 counts as 0.
        """
        constants = [self._constants(part, tensor_scale) for part in parts]
        codes = [self.codes_of(part.blocks, *of[2:]).reshape(-1) for part, of in zip(parts, constants, strict=True)]
        stored, location, *_ = joined(constants)
        self.check_scale(stored)
        return (torch.cat(codes) if len(codes) > 1 else codes[0]), stored, location

    def check_scale(self, stored: Tensor) -> None:
        """Raise ValueError where a block of finite values has a range or a deviation too large for constants_dtype.

        Not so an absmax in float32: to look at those would only wait for the GPU.
        """
        if self.scale_is_absmax and self.constants_dtype == torch.float32:
            return
        if not stored.isfinite().all():
            raise ValueError(f"a block's scale exceeds {self.constants_dtype}, in which {self.name!r} stores it")

    def codes_of(self, blocks: Tensor, scale: Tensor, location: Tensor | None) -> Tensor:
        """Codes of blocks whose constants are given: float32 (n_blocks, width) to uint8 of the same shape."""
        centred = blocks if location is None else blocks - location[:, None]
        return self.nearest(_normalized(centred, scale))

    def decode(self, codes: Tensor, scale: Tensor, location: Tensor | None) -> Tensor:
        """The values that codes stand for: uint8 (n_blocks, block_size) to float32 of the same shape.

        scale: float32 (n_blocks,), times the tensor's where the format has one.
        """
        values = self.tables(codes.device).levels[codes.int()] * scale[:, None]
        return values if location is None else values + location[:, None]

    def decode_flat(self, codes: Tensor, block_size: int, scale: Tensor, location: Tensor | None) -> Tensor:
        """`decode` for codes (n,) of which the last block may be shorter: float32 (n,)."""
        blocks = F.pad(codes, (0, -len(codes) % block_size)).reshape(-1, block_size)
        return self.decode(blocks, scale, location).reshape(-1)[: len(codes)]

    def constants(
        self, blocks: Tensor, tensor_scale: Tensor | None = None, search=None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Scale and location as stored, then scale and location that codes are made with: four of (n_blocks,).

        search: what does the work of `least_squares`, for a backend that has something faster.
        """
        return self._constants(Normalized(blocks, *self.normalize(blocks)), tensor_scale, search)

    def _constants(self, part: Normalized, tensor_scale: Tensor | None, search=None) -> tuple:
        blocks, scale, location = part
        scale = scale / self.extreme
        stored = self.as_stored(scale, tensor_scale)
        stored_location = None if location is None else self.as_stored(location)
        if self.exact_codes:
            return stored, stored_location, scale, location
        if self.search:
            factors = torch.tensor(self.search, dtype=torch.float32, device=scale.device)
            trials = self.as_stored(scale * factors[:, None], tensor_scale)
            best = (search or self.least_squares)(blocks, _times(trials, tensor_scale), stored_location)
            stored = trials.gather(0, best[None])[0]
        return stored, stored_location, _times(stored, tensor_scale), stored_location

    def as_stored(self, constants: Tensor, tensor_scale: Tensor | None = None) -> Tensor:
        """Float32 constants, over the tensor's scale if there is one, rounded to what `constants_dtype` holds.

        What lies above the range of the dtype becomes infinite or NaN.
        """
        if tensor_scale is not None:
            constants = torch.where(constants == 0, constants, constants / tensor_scale)
        if self.constants_dtype == torch.float8_e4m3fn:
            constants = torch.where(constants.abs() > E4M3_OVERFLOW, torch.nan, constants)
        return constants.to(self.constants_dtype).float()

    def scale_of_tensor(self, x: Tensor) -> Tensor | None:
        """The one scale of tensor x: float32 (), or None for formats without; 0 for a tensor of zeros."""
        if not self.tensor_scale:
            return None
        greatest = torch.finfo(self.constants_dtype).max * abs(self.extreme)
        return x.abs().amax().float() / greatest if x.numel() else x.new_zeros((), dtype=torch.float32)

    def least_squares(self, blocks: Tensor, trials: Tensor, location: Tensor | None) -> Tensor:
        """Which trial scale gives each block the least squared error: int64 (n_blocks,); of equal ones the first.

        trials: float32 (n_trials, n_blocks). Errors are measured in units of the first, in which they can't overflow.
        """
        centred = blocks if location is None else blocks - location[:, None]
        best, least = torch.zeros(len(blocks), dtype=torch.int64, device=blocks.device), None
        for k, trial in enumerate(trials):
            normalized = _normalized(centred, trial)
            error = normalized - self.tables(blocks.device).levels[self.nearest(normalized).int()]
            ratio = trial / trials[0]
            cost = _sum_in_lanes(error * error) * (ratio * ratio)
            least = cost if least is None else least
            best, least = torch.where(cost < least, k, best), torch.where(cost < least, cost, least)
        return best


@lru_cache(maxsize=256)
def _tables_on(format: Format, device: torch.device) -> Tables:
    return Tables(*(table.to(device) for table in format.tables(torch.device("cpu"))))


def joined(constants: list[tuple]) -> list[Tensor | None]:
    """Four constants of each part of a tensor to four of the whole."""
    columns = zip(*constants, strict=True)
    return [column[0] if len(column) == 1 or None in column else torch.cat(column) for column in columns]


def _times(stored: Tensor, tensor_scale: Tensor | None) -> Tensor:
    return stored if tensor_scale is None else stored * tensor_scale


def _normalized(centred: Tensor, scale: Tensor) -> Tensor:
    """centred / scale, block by block: by the reciprocal, or by division where that is infinite; 0/0 is 0."""
    reciprocal = (1 / scale)[:, None]
    normalized = centred * reciprocal
    tiny = reciprocal.isinf()
    if centred.device.type != "cpu" or tiny.any():  # to look would wait for the GPU
        normalized = torch.where(tiny, (centred / scale[:, None]).nan_to_num(nan=0.0), normalized)
    return normalized


def _sum_in_lanes(values: Tensor) -> Tensor:
    """The sum of each row, float32: every eighth value in a sum of its own, then those 8 by halves.

    A fixed order of additions, so that every backend gets the same sum. Rows are filled with zeros to a multiple of 8.
    """
    groups = F.pad(values, (0, -values.shape[1] % 8)).unflatten(1, (-1, 8))
    lanes = torch.zeros_like(groups[:, 0])
    for group in groups.unbind(1):
        lanes = lanes + group
    for half in (4, 2, 1):
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]
