"""Formats: how a block is normalised, which levels it is rounded to, how its codes and constants are stored.

normalizations   what a block is scaled by, and shifted by
format           a format, and the one formula by which all are decoded
table            every format by name
double_quant     constants quantized too
packing          codes in bytes
"""

from nf4lab.formats.format import SEARCH, Format
from nf4lab.formats.normalizations import (
    NORMALIZATIONS,
    Normalization,
    absmax,
    mean_std,
    min_max,
    normalization_of,
    power_of_two,
    signed_absmax,
)  # fmt: skip
from nf4lab.formats.table import FORMATS, as_format

__all__ = [
    "FORMATS", "NORMALIZATIONS", "SEARCH", "Format", "Normalization", "absmax", "as_format", "mean_std", "min_max",
    "normalization_of", "power_of_two", "signed_absmax",
]  # fmt: skip
