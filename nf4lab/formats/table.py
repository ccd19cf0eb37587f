"""Every format by name: a row of the table each, made when it is first asked for."""

import difflib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from nf4lab import codebooks
from nf4lab.formats.format import Format
from nf4lab.formats.normalizations import absmax, mean_std, min_max, power_of_two, signed_absmax


class _Table(Mapping):
    """Formats by name, each made when it is first asked for: some derive their levels, and importing need not wait."""

    def __init__(self, rows: list[tuple[str, Callable[[], Format]]]):
        self._rows, self._made = dict(rows), {}

    def __getitem__(self, name: str) -> Format:
        if name not in self._made:
            self._made[name] = self._rows[name]()
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def _row(name: str, levels: Callable[[], Tensor], *rest, **named) -> tuple[str, Callable[[], Format]]:
    return name, lambda: Format(name, levels(), *rest, **named)


FORMATS = _Table([
    _row("nf4", codebooks.nf4),
    _row("nf3", codebooks.nf3),
    _row("nf2", codebooks.nf2),
    _row("fp4", codebooks.fp4),
    _row("int4", codebooks.symmetric_int),
    _row("uniform", codebooks.uniform, min_max),
    _row("naive-quantile", codebooks.quantile_midpoints, mean_std),
    _row("cube-root", codebooks.cube_root, mean_std),
    _row("sf4", codebooks.sf4),
    _row("af4", codebooks.af4),
    _row("bof4", codebooks.bof4),
    _row("bof4-s", codebooks.bof4_s, signed_absmax),
    _row("e2m1", codebooks.e2m1, extreme=6, ties="even"),
    _row("mxfp4", codebooks.e2m1, power_of_two, torch.float8_e8m0fnu, extreme=4, block_size=32, ties="even"),
    _row("nvfp4", codebooks.e2m1, absmax, torch.float8_e4m3fn, extreme=6, tensor_scale=True, block_size=16,
         ties="even"),
    _row("q4_0", codebooks.twos_complement, signed_absmax, torch.float16, extreme=-8, block_size=32,
         ties="up", exact_codes=True),
    _row("iq4_nl", codebooks.iq4_nl, signed_absmax, torch.float16, extreme=-127, block_size=32),
])  # fmt: skip

# Codebooks that are made for the block size that they are used at; the rows have them for 64.
FOR_BLOCK_SIZE = {"af4": codebooks.af4, "bof4": codebooks.bof4, "bof4-s": codebooks.bof4_s}


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
