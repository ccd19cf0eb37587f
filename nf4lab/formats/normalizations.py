"""How a block is brought to the range of its levels: rules that make a scale, and some a location, of a block.

A rule is a function of blocks; `normalized` cuts values into blocks and gives each what its rule makes of it. What the
rest of the package must know of a rule stands in its row of `NORMALIZATIONS`: a new rule is a function and a row here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# blocks, float32 (n_blocks, block_size) -> scale (n_blocks,) and location (n_blocks,), or None where it is zero
Rule = Callable[[Tensor], tuple[Tensor, Tensor | None]]


def absmax(blocks: Tensor) -> tuple[Tensor, None]:
    """Scale a block by its largest magnitude, so that it lies in -1..1 and zero stays zero."""
    return blocks.abs().amax(dim=1), None


def signed_absmax(blocks: Tensor) -> tuple[Tensor, None]:
    """Scale a block by its element of largest magnitude, sign and all, so that this element becomes +1.

    Of several such elements the first counts, as in llama.cpp. Source: BOF4 (arXiv:2505.06653), BOF4-S.
    """
    largest = blocks.abs().argmax(dim=1, keepdim=True)
    return blocks.gather(1, largest).squeeze(1) + 0.0, None  # + 0.0: the scale of a block of -0.0 is 0.0


def power_of_two(blocks: Tensor) -> tuple[Tensor, None]:
    """Scale a block by the largest power of two that its absmax reaches: 2**floor(log2(absmax)), exact.

    A block of zeros has 0. Source: OCP Microscaling Formats 1.0, section 6.3.
    """
    absmax = blocks.abs().amax(dim=1)
    mantissa = torch.frexp(absmax).mantissa  # absmax = mantissa * 2**exponent, 1/2 <= mantissa < 1
    return torch.where(mantissa > 0, absmax / (2 * mantissa), 0.0), None  # a quotient that float32 holds is exact


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


@dataclass(frozen=True)
class Normalization:
    """What is known of a rule.

    has_location: whether it shifts blocks, by a second constant.
    has_sign: whether a constant of it can be negative.
    depends_on: what alone of a block it depends on, so that the rule gives for this what it gives for the block:
    "magnitude", the first element of largest magnitude; "range", the least and the greatest; "moments", mean and
    deviation; or "all". It decides how kernels and quadrature go about it.
    in_steps: whether its scale takes few values, so that errors jump where it changes.
    """

    rule: Rule
    has_location: bool = False
    has_sign: bool = False
    depends_on: str = "all"
    in_steps: bool = False

    @property
    def name(self) -> str:
        """The function's name, under which files store it."""
        return getattr(self.rule, "__name__", repr(self.rule))


NORMALIZATIONS = {
    known.name: known
    for known in (
        Normalization(absmax, depends_on="magnitude"),
        Normalization(signed_absmax, has_sign=True, depends_on="magnitude"),
        Normalization(power_of_two, depends_on="magnitude", in_steps=True),
        Normalization(min_max, has_location=True, has_sign=True, depends_on="range"),
        Normalization(mean_std, has_location=True, has_sign=True, depends_on="moments"),
    )
}


def normalization_of(rule: Rule) -> Normalization:
    """What is known of a rule: its row, or for a rule of one's own what a block of 16 ones shows of it."""
    known = NORMALIZATIONS.get(getattr(rule, "__name__", ""))
    if known and known.rule is rule:
        return known
    return Normalization(rule, has_location=rule(torch.ones(1, 16, dtype=torch.float32, device="cpu"))[1] is not None)


def is_known(rule: Rule) -> bool:
    """Whether the rule has a row."""
    return normalization_of(rule) in NORMALIZATIONS.values()


class Normalized(NamedTuple):
    """Blocks of one width, float32 (n_blocks, width), with the scale and the location (n_blocks,) of each, or None."""

    blocks: Tensor
    scale: Tensor
    location: Tensor | None


def normalized(values: Tensor, block_size: int, rule: Rule) -> list[Normalized]:
    """Values, float32 (n,), in blocks with what the rule makes of each: the whole blocks, then the short last one."""
    return [Normalized(blocks, *rule(blocks)) for blocks in in_blocks(values, block_size)]


def in_blocks(values: Tensor, block_size: int) -> list[Tensor]:
    """Values (n,) in blocks: (n_whole, block_size), then a short last one (1, rest); each only where there is one."""
    whole = len(values) - len(values) % block_size
    parts = [values[:whole].reshape(-1, block_size), values[whole:].reshape(1, -1)]
    return [part for part in parts if part.numel()] or parts[:1]
